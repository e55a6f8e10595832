package firewall

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/go-cmp/cmp"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
	"github.com/warren-cni/warren/pkg/testnode"
)

// rivals are the chains of docker, ufw and kube-proxy that judge forwarded packets, with what an operator adds there to let all
// pass. Policy DROP is docker's.
const rivals = `*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-FORWARD - [0:0]
:DOCKER-USER - [0:0]
:KUBE-FORWARD - [0:0]
:ufw-before-forward - [0:0]
:ufw-user-forward - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-FORWARD
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -j ufw-before-forward
-A DOCKER -i docker0 ! -o docker0 -j DROP
-A DOCKER-FORWARD -o docker0 -j DOCKER
-A DOCKER-FORWARD -i docker0 -j ACCEPT
-A DOCKER-USER -i wrn1 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
-A ufw-user-forward -p udp -j ACCEPT
COMMIT
*mangle
:FORWARD ACCEPT [0:0]
:OTHERS - [0:0]
-A FORWARD -j OTHERS
-A OTHERS -m mark --mark 0x7/0x7 -j RETURN
COMMIT
`

// The pods of a site, by the number in the name of their link.
const (
	server = iota
	friend
	foe
)

// site is a node with three pods. A policy isolates the server and allows its friend.
type site struct {
	*node
	firewall *Firewall
	rules    netfilter.Ruleset
	pods     [3]ns.NetNS
	self     ns.NetNS
	socket   *net.UDPConn
	sent     int
}

func newSite(n *node) *site {
	n.t.Helper()
	s := &site{node: n, firewall: n.firewall(), rules: rulesOfSite()}
	for _, name := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		s.check(os.WriteFile("/proc/sys/net/"+name, []byte("1"), 0))
	}
	for i := range s.pods {
		pod := testnode.New(n.t)
		s.pods[i] = pod
		host := fmt.Sprintf("wrn%d", i)
		inside := "nsenter --net=" + pod.Path() + " ip "
		n.run("ip link add " + host + " address 02:00:00:00:00:01 type veth peer name p address 02:00:00:00:00:02 netns " + filepath.Base(pod.Path()))
		n.run("ip link set " + host + " up")
		n.run(inside + "link set p up")
		for gateway, address := range map[string]netip.Addr{"169.254.1.1": podAddresses(i)[0], "fe80::1": podAddresses(i)[1]} {
			prefix := netfilter.Address(address).Prefix.String()
			n.run("ip route add " + prefix + " dev " + host)
			n.run("ip neigh add " + address.String() + " lladdr 02:00:00:00:00:02 dev " + host + " nud permanent")
			n.run(inside + "addr add " + prefix + " dev p" + map[bool]string{true: " nodad"}[address.Is6()])
			n.run(inside + "neigh add " + gateway + " lladdr 02:00:00:00:00:01 dev p nud permanent")
			n.run(inside + "route add default via " + gateway + " dev p onlink")
		}
	}
	n.run("ip link set lo up")
	n.run("ip addr add 192.0.2.1/32 dev lo")
	n.run("ip addr add 2001:db8::1/128 dev lo nodad")
	var err error
	s.self, err = ns.GetCurrentNS()
	s.check(err)
	n.t.Cleanup(func() { _ = s.self.Close() })
	s.check(s.pods[server].Do(func(ns.NetNS) error {
		s.socket, err = net.ListenUDP("udp", &net.UDPAddr{Port: 7777})
		return err
	}))
	n.t.Cleanup(func() { _ = s.socket.Close() })
	return s
}

// podAddresses returns the two addresses of a pod.
func podAddresses(i int) []netip.Addr {
	return []netip.Addr{netip.AddrFrom4([4]byte{10, 1, 0, byte(2 + i)}), netip.MustParseAddr(fmt.Sprintf("fd00:1::%d", 2+i))}
}

// rulesOfSite plans everything that a site's node needs.
func rulesOfSite() netfilter.Ruleset {
	world := cluster.Snapshot{Self: "node", Namespaces: []cluster.Namespace{{Name: "shop"}}}
	var ready []netip.Addr
	for _, i := range []int{foe, friend, server} { // by name
		name := map[int]string{server: "server", friend: "friend", foe: "foe"}[i]
		world.Pods = append(world.Pods, cluster.Pod{
			Namespace: "shop", Name: name, UID: name, Node: "node", Labels: labels.Set{"app": name}, Addresses: podAddresses(i),
		})
		ready = append(ready, podAddresses(i)...)
	}
	world.Policies = []cluster.Policy{{
		Namespace: "shop", Name: "server", UID: "policy", Pods: labels.SelectorFromSet(labels.Set{"app": "server"}), Ingress: true,
		IngressRules: []cluster.Rule{{AnyPort: true, Peers: []cluster.Peer{{Pods: labels.SelectorFromSet(labels.Set{"app": "friend"})}}}},
	}}
	rules, _ := policy.Compile(world)
	return netfilter.Merge(rules, guard.Compile(guard.Config{
		PodCIDRs:     []netip.Prefix{netip.MustParsePrefix("10.1.0.0/24"), netip.MustParsePrefix("fd00:1::/64")},
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16"), netip.MustParsePrefix("fd00:1::/56")},
		Encrypted:    true, Ready: ready,
	}))
}

func (s *site) check(err error) {
	s.t.Helper()
	if err != nil {
		s.t.Fatal(err)
	}
}

// expect sends a packet from a pod in each family and says whether the server gets it, as it should.
func (s *site) expect(when string, client int, want bool) {
	s.t.Helper()
	s.expectFrom(s.pods[client], fmt.Sprintf("%s: pod %d", when, client), want)
}

// expectFrom is expect from any namespace.
func (s *site) expectFrom(client ns.NetNS, who string, want bool) {
	s.t.Helper()
	// A packet is in the server's buffer, or dropped, when it has been sent.
	wait := map[bool]time.Duration{true: 10 * time.Second, false: 100 * time.Millisecond}[want]
	for _, to := range podAddresses(server) {
		s.sent++
		marker := fmt.Sprint("probe ", s.sent)
		s.check(client.Do(func(ns.NetNS) error {
			conn, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 7777)))
			if err != nil {
				return err
			}
			_, err = conn.Write([]byte(marker))
			return errors.Join(err, conn.Close())
		}))
		if got := s.receives(marker, wait); got != want {
			s.t.Errorf("%s reaches %s: %v, want %v", who, to, got, want)
		}
	}
}

// receives waits for a datagram.
func (s *site) receives(marker string, wait time.Duration) bool {
	s.t.Helper()
	s.check(s.socket.SetReadDeadline(time.Now().Add(wait))) //nolint:forbidigo // sockets know no contexts
	buffer := make([]byte, 100)
	for {
		count, _, err := s.socket.ReadFromUDP(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		s.check(err)
		if string(buffer[:count]) == marker {
			return true
		}
	}
}

// repair does what the audit does.
func (s *site) repair() {
	s.t.Helper()
	s.firewall.Forget()
	s.apply(s.firewall, s.rules)
}

// others are the rules of other programs.
func (s *site) others() []string {
	return slices.DeleteFunc(strings.Split(s.state(), "\n"), func(line string) bool { return strings.Contains(line, netfilter.Prefix) })
}

// iptablesRestore restores a text in both families.
func (s *site) iptablesRestore(text string) {
	s.t.Helper()
	name := filepath.Join(s.t.TempDir(), "rules")
	s.check(os.WriteFile(name, []byte(text), 0o600))
	for _, program := range []string{"iptables-", "ip6tables-"} {
		s.run(program + s.backend + "-restore " + name)
	}
}

// TestRivalsOpenNothing lets other programs do to the rules what they do on real nodes. What a policy denies stays denied, also
// where no packet comes to the rules that judge, or these are flushed, but not where all tables are replaced at once. An audit brings back what was, and
// touches no rule of others. Between the node and its pods all goes on meanwhile.
func TestRivalsOpenNothing(t *testing.T) {
	attacks := []struct {
		name string
		do   func(s *site)
		// open: all our rules are gone until the audit. shut: no packet comes to those that judge, or these or their sets are
		// gone, or what accepts.
		open, shut bool
	}{
		{name: "ACCEPT first in filter", do: func(s *site) { s.iptables("-I FORWARD -j ACCEPT") }},
		{name: "ACCEPT first in an earlier table", do: func(s *site) { s.iptables("-t raw -I PREROUTING -j ACCEPT") }},
		{name: "filter flushed", do: func(s *site) { s.iptables("-F FORWARD"); s.iptables("-P FORWARD DROP") }, shut: true},
		{name: "sets flushed", do: func(s *site) { s.run("ipset flush") }, shut: true},
		{name: "ACCEPT first in mangle", do: func(s *site) { s.iptables("-t mangle -I FORWARD -j ACCEPT") }, shut: true},
		{
			name: "jump deleted",
			do:   func(s *site) { s.iptables("-t mangle -D FORWARD -m comment --comment warren -j WARREN-FORWARD") }, shut: true,
		},
		{
			name: "FORWARD flushed",
			do:   func(s *site) { s.iptables("-t mangle -F FORWARD"); s.iptables("-I FORWARD -j ACCEPT") }, shut: true,
		},
		{name: "chain flushed", do: func(s *site) { s.iptables("-t mangle -F WARREN-FORWARD") }, shut: true},
		{name: "policies flushed", do: func(s *site) { s.iptables("-t mangle -F " + netfilter.PolicyChain) }, shut: true},
		{name: "group flushed", do: func(s *site) { s.iptables("-t mangle -F " + netfilter.Name("I", "shop/server")) }, shut: true},
		{name: "isolated flushed", do: func(s *site) { s.run("ipset flush WARREN-ISOLATED4"); s.run("ipset flush WARREN-ISOLATED6") }, shut: true},
		{name: "mangle flushed", do: func(s *site) { s.iptables("-t mangle -F") }, shut: true},
		{name: "all restored as it was before", do: func(s *site) { s.iptablesRestore(rivals) }, open: true},
	}
	onEach(t, func(n *node) {
		s := newSite(n)
		s.iptablesRestore(rivals)
		s.expect("without rules of ours", foe, true)
		s.expect("without rules of ours", friend, true)
		before := s.others()
		s.repair()
		if diff := cmp.Diff(before, s.others()); diff != "" {
			n.t.Errorf("rules of others changed:\n%s", diff)
		}
		s.expect("with all rules", foe, false)
		s.expect("with all rules", friend, true)
		for _, attack := range attacks {
			attack.do(s)
			s.expect(attack.name, foe, attack.open)
			s.expect(attack.name, friend, !attack.shut)
			s.expectFrom(s.self, attack.name+": the node", true)
			before := s.others()
			s.repair()
			if diff := cmp.Diff(before, s.others()); diff != "" {
				n.t.Errorf("%s: rules of others changed:\n%s", attack.name, diff)
			}
			s.expect("repaired after "+attack.name, foe, false)
			s.expect("repaired after "+attack.name, friend, true)
			if got := s.drift(s.firewall, s.rules); len(got) > 0 {
				n.t.Errorf("%s: in the end there is %q", attack.name, got)
			}
		}
	})
}
