package wgdevice_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// TestNodeAddresses sends a pod's packets to other nodes' own addresses, through the tunnel where a challenge has shown that a node
// is there, and as ever where none has.
func TestNodeAddresses(t *testing.T) {
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		t.Run(map[int]string{netlink.FAMILY_V4: "IPv4", netlink.FAMILY_V6: "IPv6"}[family], func(t *testing.T) {
			l := newLab(t, 3) // the third has no mesh
			a, b, c := l.nodes[0], l.nodes[1], l.nodes[2]
			pod := a.addPod(t)
			address := func(n *node) netip.Addr {
				v4, v6 := uplink(n.number)
				if family == netlink.FAMILY_V6 {
					return v6
				}
				return v4
			}
			plain := a.plan(t, a, b, c)
			want := a.plan(t, a, b, c)
			for i, other := range []*node{b, c} {
				v4, v6 := uplink(other.number)
				claim(&want, i, v4, v6)
				want.Peers[i].Endpoint = netip.AddrPortFrom(address(other), wireGuardPort)
				plain.Peers[i].Endpoint = want.Peers[i].Endpoint
			}
			b.apply(t, b.plan(t, a, b))
			a.apply(t, want)
			if got := a.nodeRoutes(t); got != "rule 10.244.1.0/24\nrule fd00:0:0:1::/64\n" {
				t.Errorf("before any handshake:\n%s", got)
			}
			marker := newMarker()
			a.reach(t, b, marker)

			wire := l.listen(t, marker)
			if changes := a.apply(t, want); changes.Any() {
				t.Errorf("after a handshake alone the apply wrote %+v", changes)
			}
			if !a.challenge(t, want) || a.challenge(t, want) {
				t.Error("the node that is there is to be found, once")
			}
			if changes := a.apply(t, want); changes != (wgdevice.Changes{Peers: 1, Routes: 2}) {
				t.Errorf("after the challenge the apply wrote %+v", changes)
			}
			if again := a.apply(t, want); again.Any() {
				t.Errorf("the second apply wrote %+v", again)
			}
			pod.transfer(t, address(b), []byte(marker))
			if got := wire.count(t); inClear(got) || got.WireGuard == 0 {
				t.Errorf("from a pod to a node: %v, want nothing in clear", got)
			}
			if used := peerOf(t, a, b).NodeAddresses; !slices.Equal(used, []netip.Addr{address(b)}) {
				t.Errorf("in use: %v, want %s alone", used, address(b))
			}

			// Where somebody sends the node's packets on from another address, the tunnel sends there, and what pods send to the node stays in it.
			honest := b.disguise(t, address(c), "")
			for range 20 {
				if _, _ = b.ask(first(a.addresses()), marker, 1); peerOf(t, a, b).Endpoint.Addr() == address(c) {
					break
				}
			}
			if at := peerOf(t, a, b).Endpoint.Addr(); at != address(c) {
				t.Errorf("the peer is seen at %s, want %s", at, address(c))
			}
			if changes := a.apply(t, want); changes.Any() {
				t.Errorf("with the peer elsewhere the apply wrote %+v", changes)
			}
			wire.count(t)
			_, _ = pod.ask(address(b), marker, 2)
			if got := wire.count(t); inClear(got) || got.WireGuard == 0 {
				t.Errorf("from a pod to a node that is seen elsewhere: %v, want nothing in clear", got)
			}
			honest()
			if _, err := b.ask(first(a.addresses()), marker, 20); err != nil {
				t.Fatal(err)
			}

			// The node itself, and a node that nobody shook hands with, are reached as ever.
			a.transfer(t, address(b), []byte(marker))
			if got := wire.count(t); got.Marked == 0 {
				t.Errorf("from node to node: %v, want packets in clear", got)
			}
			pod.transfer(t, address(c), []byte(marker))
			if got := wire.count(t); got.Marked == 0 || len(peerOf(t, a, c).NodeAddresses) > 0 {
				t.Errorf("to a node without a mesh: %v, want packets in clear", got)
			}

			// Another change of the peer leaves it alone; with the plan it goes, and so do the rules.
			changed := want.Peers[0]
			changed.AllowedIPs = changed.AllowedIPs[:1]
			if changes := a.patch(t, mesh.Change{Peers: []mesh.Peer{changed}}); changes != (wgdevice.Changes{Peers: 1}) {
				t.Errorf("another change of the peer wrote %+v", changes)
			}
			if used := peerOf(t, a, b).NodeAddresses; len(used) != 1 {
				t.Errorf("after another change of the peer: %v", used)
			}
			if changes := a.patch(t, mesh.Change{Peers: plain.Peers[:1]}); changes != (wgdevice.Changes{Peers: 1, Routes: 1}) {
				t.Errorf("a change that takes the address away wrote %+v", changes)
			}
			a.apply(t, want)
			if !a.challenge(t, want) {
				t.Error("the node that is there is not found again")
			}
			a.apply(t, want)
			wire.count(t)
			if changes := a.apply(t, plain); changes != (wgdevice.Changes{Peers: 1, Routes: 4}) {
				t.Errorf("without node addresses the apply wrote %+v", changes)
			}
			if got := a.nodeRoutes(t); got != "" {
				t.Errorf("without node addresses:\n%s", got)
			}
			if _, err := pod.ask(address(b), marker, 1); err == nil {
				t.Error("an answer came, although it goes into the tunnel and is not allowed there")
			}
			if got := wire.count(t); !inClear(got) {
				t.Errorf("without node addresses: %v, want packets in clear", got)
			}
		})
	}
}

// TestNodeAddressIsHeld takes away what leads to a node's own address through the tunnel: what pods send there does not leave in clear then,
// whoever begins anew, until no Node claims the address any more.
func TestNodeAddressIsHeld(t *testing.T) {
	for i, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) {
			l := newLab(t, 2)
			a, b := l.nodes[0], l.nodes[1]
			pod := a.addPod(t)
			v4, v6 := uplink(b.number)
			address := []netip.Addr{v4, v6}[i]
			plain, want := a.plan(t, a, b), a.plan(t, a, b)
			claim(&want, 0, address)
			want.Peers[0].Endpoint = netip.AddrPortFrom(address, wireGuardPort)
			marker := newMarker()
			b.apply(t, b.plan(t, a, b))
			find := func() {
				t.Helper()
				a.apply(t, want)
				a.reach(t, b, marker)
				if !a.challenge(t, want) {
					t.Fatal("the node is not found where it is")
				}
				a.apply(t, want)
			}
			linkDown := func() error {
				link, err := netlinksafe.LinkByName(mesh.Link)
				return errors.Join(err, netlink.LinkSetDown(link))
			}
			find()
			wire := l.listen(t, marker)
			probe := func(what string, plainly bool) {
				t.Helper()
				_, err := pod.ask(address, marker, 2)
				if got := wire.count(t); inClear(got) != plainly || err == nil && !plainly {
					t.Errorf("%s: %v, error %v; want packets in clear: %t", what, got, err, plainly)
				}
			}
			through := func(what string) {
				t.Helper()
				wire.count(t)
				pod.transfer(t, address, []byte(marker))
				if got := wire.count(t); inClear(got) || got.WireGuard == 0 {
					t.Errorf("%s: %v, want all in the tunnel", what, got)
				}
			}
			through("found")

			a.do(t, linkDown)
			probe("with the link down", false)
			a.apply(t, want)
			through("after the repair")

			// Daemon and tunnel begin anew, and know nothing of what was found.
			a.device = newDevice(t, testMode())
			a.do(t, func() error {
				client, err := wgctrl.New()
				if err != nil {
					return err
				}
				return errors.Join(linkDown(), client.ConfigureDevice(mesh.Link, wgtypes.Config{ReplacePeers: true}), client.Close())
			})
			a.apply(t, want)
			probe("not found again yet", false)
			find()
			through("found again")

			// A node that is no peer any more, by a key or a podCIDR that counts no longer, still claims what it is.
			a.patch(t, mesh.Change{RemovedPeers: want.Peers, RemovedRoutes: want.Routes})
			probe("no peer after a change", false)
			gone := a.plan(t, a)
			gone.Hosts = want.Hosts
			a.apply(t, gone)
			probe("no peer any more", false)
			find()
			through("a peer again")

			// A pod that keeps its address where the node gets other podCIDRs; without the stray the same probe leaves in clear.
			own4, own6 := a.addresses()
			moved := want
			moved.PodCIDRs = []netip.Prefix{netip.MustParsePrefix("10.244.99.0/24"), netip.MustParsePrefix("fd00:0:0:99::/64")}
			a.apply(t, moved)
			probe("not known for a pod", true)
			moved.Strays = []netip.Addr{own4.Next(), own6.Next()}
			a.apply(t, moved)
			through("from an address of the podCIDR before")
			a.apply(t, want)
			through("in its podCIDR again")
			if a.apply(t, plain); a.nodeRoutes(t) != "" {
				t.Errorf("without a claim:\n%s", a.nodeRoutes(t))
			}

			// The positive control: given up by the operator, the same probe leaves in clear.
			find()
			a.do(t, func() error {
				out, err := exec.Command("sh", "-c", wgdevice.GiveUp(address)).CombinedOutput()
				if err != nil {
					err = fmt.Errorf("%w: %s", err, out)
				}
				return errors.Join(linkDown(), err)
			})
			probe("without the net", true)
		})
	}
}

// TestNodeIsFoundInOneFamily is a node whose link could not get its address of the other family.
func TestNodeIsFoundInOneFamily(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	v4, _ := uplink(b.number)
	want := a.plan(t, a, b)
	claim(&want, 0, v4)
	b.apply(t, b.plan(t, a, b))
	a.apply(t, want)
	a.reach(t, b, newMarker())
	own4, own6 := want.Addresses[0], want.Addresses[1]
	foreign4, foreign6 := netip.MustParsePrefix("198.51.100.1/32"), netip.MustParsePrefix("fd00:dead::1/128")
	for name, addresses := range map[string][]netip.Prefix{"IPv4": {own4, foreign6}, "IPv6": {foreign4, own6}, "neither": {foreign4, foreign6}} {
		a.device = newDevice(t, testMode()) // it knows of nobody who was found
		a.apply(t, want)
		half := want
		half.Addresses = addresses
		found := false
		_, err := try(a.host, func() (any, error) { return nil, a.device.Challenge(t.Context(), half, nil, func() { found = true }) })
		if err == nil || found == (name == "neither") {
			t.Errorf("%s: the node that is there is found: %t, error %v; want an error for the other family", name, found, err)
		}
	}
}

// TestNodeAddressOfAnother has a node claim another host's address and send with that for a source, at random with every second packet: what
// WireGuard tells of it is at times what it tells of a node that is there, but it does not get the address. That host gets it once it is a
// node, though the other one claims it too, and keeps it.
func TestNodeAddressOfAnother(t *testing.T) {
	for name, address := range map[string]func(*node) netip.Addr{
		"IPv4": func(n *node) netip.Addr { return first(uplink(n.number)) },
		"IPv6": func(n *node) netip.Addr { _, v6 := uplink(n.number); return v6 },
	} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, 3) // the third has no mesh at first
			a, liar, victim := l.nodes[0], l.nodes[1], l.nodes[2]
			claimed := address(victim)
			// plan has all other nodes of the plan claim an address, and be sent to by the family.
			plan := func(n *node, nodes ...*node) mesh.Config {
				c := n.plan(t, nodes...)
				for i := range c.Peers {
					other := nodes[slices.IndexFunc(nodes, func(o *node) bool { return o.name() == c.Peers[i].Node })]
					c.Peers[i].Endpoint = netip.AddrPortFrom(address(other), wireGuardPort)
					claim(&c, i, claimed)
				}
				return c
			}
			want := plan(a, a, liar)
			a.apply(t, want)
			liar.apply(t, plan(liar, a, liar))
			honest := liar.disguise(t, claimed, "numgen random mod 2 0")
			flood := liar.flood(t, a)
			defer flood()
			there := func() (time.Time, bool) {
				p := peerOf(t, a, liar)
				return p.LastHandshake, p.Endpoint.Addr() == claimed
			}
			deceived := false
			for range 200 {
				before, seen := there()
				liar.apply(t, plan(liar, liar))
				liar.apply(t, plan(liar, a, liar)) // it begins anew, with a handshake
				_, _ = liar.ask(first(a.addresses()), newMarker(), 1)
				handshake, still := there()
				if deceived = seen && still && handshake.After(before); deceived {
					break
				}
			}
			if !deceived {
				t.Error("WireGuard never told of a handshake while the node was at the address: it does not lie as it should")
			}
			for i := range 15 {
				if a.challenge(t, want) {
					t.Fatalf("challenge %d: it is taken for a node that receives at %s", i, claimed)
				}
				if changes := a.apply(t, want); changes.Any() && len(peerOf(t, a, liar).NodeAddresses) > 0 {
					t.Fatalf("challenge %d: it got %s", i, claimed)
				}
			}

			both := plan(a, a, liar, victim)
			a.apply(t, both)
			victim.apply(t, plan(victim, a, victim))
			found := func(want mesh.Config) bool {
				for range 20 {
					if a.challenge(t, want) {
						return true
					}
				}
				return false
			}
			if !found(both) {
				t.Fatal("the host that is there is not found")
			}
			for i := range 5 {
				a.apply(t, both)
				if used := peerOf(t, a, victim).NodeAddresses; !slices.Equal(used, []netip.Addr{claimed}) || len(peerOf(t, a, liar).NodeAddresses) > 0 {
					t.Fatalf("challenge %d: the host that is there has %v, the other one %v", i, used, peerOf(t, a, liar).NodeAddresses)
				}
				if a.challenge(t, both) {
					t.Errorf("challenge %d: another is found", i)
				}
			}

			// Where it is, it is found.
			claim(&want, 0, address(liar))
			honest()
			a.apply(t, want)
			if !found(want) {
				t.Error("the node is not found where it is")
			}
		})
	}
}

// disguise has the tunnel's packets of a node sent with another source, those that match, until the function that it returns is called.
func (n *node) disguise(t *testing.T, source netip.Addr, match string) func() {
	t.Helper()
	family := map[bool]string{true: "ip", false: "ip6"}[source.Is4()]
	nft := func(commands string) {
		t.Helper()
		n.do(t, func() error {
			output, err := exec.Command("nft", strings.ReplaceAll(commands, "FAMILY", family)).CombinedOutput()
			if err != nil {
				return fmt.Errorf("%w: %s", err, output)
			}
			return nil
		})
	}
	nft("add table FAMILY lie; add chain FAMILY lie sent { type filter hook postrouting priority 0; }; " +
		"add rule FAMILY lie sent udp sport 51820 " + match + " FAMILY saddr set " + source.String())
	return func() { nft("delete table FAMILY lie") }
}

// claim has the node of a peer claim addresses, beside what others do.
func claim(c *mesh.Config, peer int, addresses ...netip.Addr) {
	p := &c.Peers[peer]
	p.NodeAddresses = addresses
	c.Hosts = slices.DeleteFunc(c.Hosts, func(h mesh.Host) bool { return h.Node == p.Node })
	for _, a := range addresses {
		c.Hosts = append(c.Hosts, mesh.Host{Address: a, Node: p.Node})
	}
}

// first returns the first of two.
func first(a, _ netip.Addr) netip.Addr { return a }

// challenge asks the node's peers where they receive.
func (n *node) challenge(t *testing.T, c mesh.Config) bool {
	t.Helper()
	return in(t, n.host, func() (bool, error) {
		found := false
		err := n.device.Challenge(t.Context(), c, nil, func() { found = true })
		return found, err
	})
}

// flood has a node send to another's own address through the tunnel without a pause, until the function that it returns is called.
func (n *node) flood(t *testing.T, to *node) func() {
	t.Helper()
	address, _ := to.addresses()
	socket := in(t, n.host, func() (*net.UDPConn, error) {
		return net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(address, 9)))
	})
	end, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		again := time.NewTicker(200 * time.Microsecond)
		defer again.Stop()
		for {
			select {
			case <-end:
				return
			case <-again.C:
				_, _ = socket.Write([]byte("x")) // nobody listens, and at times there is no way
			}
		}
	}()
	return func() {
		close(end)
		<-done
		_ = socket.Close()
	}
}

// TestNodeAddressesAreCleanedUp leaves nothing, and what others made stays.
func TestNodeAddressesAreCleanedUp(t *testing.T) {
	l := newLab(t, 2)
	a, b := l.nodes[0], l.nodes[1]
	v4, _ := uplink(b.number)
	want := a.plan(t, a, b)
	claim(&want, 0, v4)
	a.apply(t, want)
	b.apply(t, b.plan(t, a, b))
	a.reach(t, b, newMarker())
	a.challenge(t, want)
	a.apply(t, want)
	const standing = "192.0.2.2/32\nnothing to 192.0.2.2/32\nrule 10.244.1.0/24\nrule fd00:0:0:1::/64\n"
	if got := a.nodeRoutes(t); got != standing {
		t.Fatalf("before:\n%s", got)
	}
	a.do(t, func() error {
		foreign := netlink.NewRule()
		foreign.Table, foreign.Priority, foreign.Src = 87, 99, &net.IPNet{IP: net.IPv4(198, 51, 100, 0), Mask: net.CIDRMask(24, 32)}
		ours := *foreign
		ours.Priority, ours.Protocol = 98, wgdevice.RouteProtocol
		return errors.Join(netlink.RuleAdd(foreign), netlink.RuleAdd(&ours))
	})
	if changes := a.apply(t, want); changes != (wgdevice.Changes{Routes: 1}) {
		t.Errorf("with a rule of ours that is wanted no more the apply wrote %+v", changes)
	}
	if got := a.nodeRoutes(t); got != standing {
		t.Errorf("after the apply:\n%s", got)
	}
	a.do(t, a.device.Cleanup)
	if got := a.nodeRoutes(t); got != "" {
		t.Errorf("after the cleanup:\n%s", got)
	}
	a.do(t, func() error {
		rules, err := netlinksafe.RuleList(netlink.FAMILY_V4)
		if !slices.ContainsFunc(rules, func(r netlink.Rule) bool { return r.Priority == 99 }) {
			err = errors.Join(err, errors.New("another program's rule is gone"))
		}
		return err
	})
}

// patch applies a change on a node.
func (n *node) patch(t *testing.T, c mesh.Change) wgdevice.Changes {
	t.Helper()
	return in(t, n.host, func() (wgdevice.Changes, error) { return n.device.Patch(t.Context(), c, n.key) })
}

// addPod returns a pod of the node, as far as sending from its address makes one.
func (n *node) addPod(t *testing.T) *node {
	t.Helper()
	pod := &node{host: newHost(t)}
	own4, own6 := n.addresses()
	addresses := []netip.Addr{own4.Next(), own6.Next()}
	n.do(t, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "wrnpod"
		link := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(pod.netns)}
		err := errors.Join(
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0),
			netlink.LinkAdd(link), netlink.LinkSetUp(link))
		for i, gateway := range []string{"169.254.1.1/32", "fe80::1/64"} {
			a, errParse := netlink.ParseAddr(gateway)
			if errParse != nil {
				return errParse
			}
			a.Flags = unix.IFA_F_NODAD * i
			host := &net.IPNet{IP: addresses[i].AsSlice(), Mask: net.CIDRMask(addresses[i].BitLen(), addresses[i].BitLen())}
			err = errors.Join(err, netlink.AddrAdd(link, a), netlink.RouteAdd(&netlink.Route{Dst: host, LinkIndex: link.Attrs().Index}))
		}
		return err
	})
	pod.do(t, func() error {
		link, err := netlinksafe.LinkByName("eth0")
		if err != nil {
			return err
		}
		err = netlink.LinkSetUp(link)
		for i, gateway := range []string{"169.254.1.1", "fe80::1"} {
			a := &netlink.Addr{IPNet: &net.IPNet{IP: addresses[i].AsSlice(), Mask: net.CIDRMask(addresses[i].BitLen(), addresses[i].BitLen())}, Flags: unix.IFA_F_NODAD * i}
			err = errors.Join(err, netlink.AddrAdd(link, a),
				netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: net.ParseIP(gateway), Flags: int(netlink.FLAG_ONLINK)}))
		}
		return err
	})
	return pod
}

// nodeRoutes renders the routes to nodes' own addresses, and the rules that lead to them.
func (n *node) nodeRoutes(t *testing.T) string {
	t.Helper()
	return in(t, n.host, func() (string, error) {
		var lines []string
		for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
			routes, err := netlinksafe.RouteListFiltered(family, &netlink.Route{Table: 87}, netlink.RT_FILTER_TABLE)
			if err != nil {
				return "", err
			}
			for _, r := range routes {
				lines = append(lines, map[bool]string{true: "nothing to "}[r.Type == unix.RTN_UNREACHABLE]+r.Dst.String())
			}
			rules, err := netlinksafe.RuleList(family)
			if err != nil {
				return "", err
			}
			for _, r := range rules {
				if r.Table == 87 && r.Protocol == wgdevice.RouteProtocol {
					lines = append(lines, fmt.Sprintf("rule %s", r.Src))
				}
			}
		}
		if len(lines) == 0 {
			return "", nil
		}
		slices.Sort(lines)
		return strings.Join(lines, "\n") + "\n", nil
	})
}
