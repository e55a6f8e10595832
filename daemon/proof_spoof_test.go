package main

import (
	"errors"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// outside is a host on the wire that is no node.
func outside() []netip.Addr { return parsed("192.0.2.254", "2001:db8::fe") }

// parsed parses addresses.
func parsed(list ...string) []netip.Addr {
	var all []netip.Addr
	for _, text := range list {
		all = append(all, netip.MustParseAddr(text))
	}
	return all
}

// wireCounter counts what is on the wire in clear.
func (s *stage) wireCounter(name string) *tagged.Counter {
	s.t.Helper()
	wire, err := ns.GetNS(filepath.Join("/run/netns", name+"-wire"))
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = wire.Close() })
	return s.counter(wire)
}

// liar is a pod that sends what it likes.
type liar struct {
	t      *testing.T
	sender *tagged.Sender
	own    []netip.Addr
	shots  int
}

// newLiar makes a pod send.
func newLiar(t *testing.T, pod *lab.Pod) *liar {
	t.Helper()
	sender, err := tagged.NewSender(pod.Netns())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = sender.Close() })
	return &liar{t: t, sender: sender, own: pod.Addresses}
}

// shoot sends to all targets from all sources, by all protocols, whole and in fragments.
func (l *liar) shoot(tag uint32, sources, targets []netip.Addr) {
	l.t.Helper()
	for _, source := range sources {
		for _, target := range targets {
			if source.Is4() != target.Is4() {
				continue
			}
			for _, protocol := range tagged.Protocols() {
				l.shots++
				shot := tagged.Shot{Tag: tag, Protocol: protocol, Src: source, Dst: target, Port: port}
				serial := uint16(l.shots)
				fragments := shot.Fragments(serial + 1)
				for _, packet := range [][]byte{shot.Packet(serial), fragments[0], fragments[1]} {
					if err := l.sender.SendPacket(packet); err != nil {
						l.t.Fatal(err)
					}
				}
			}
		}
	}
}

// claim tells everybody by ARP and neighbour discovery that the pod has the addresses, and that it is a router.
func (l *liar) claim(claimed []netip.Addr) {
	l.t.Helper()
	evil := []byte{2, 6, 6, 6, 6, 6}
	everybody, anybody := netip.MustParseAddr("ff02::1"), netip.MustParseAddr("fe80::666")
	for _, address := range claimed {
		var err error
		if address.Is4() {
			for operation := range byte(2) { // request and reply, each from and for the address
				arp := slices.Concat([]byte{0, 1, 8, 0, 6, 4, 0, operation + 1}, evil, address.AsSlice(), evil, address.AsSlice())
				err = l.sender.SendFrame(unix.ETH_P_ARP, arp)
			}
		} else {
			advertisement := slices.Concat([]byte{136, 0, 0, 0, 0xe0, 0, 0, 0}, address.AsSlice(), []byte{2, 1}, evil)
			for _, source := range []netip.Addr{address, anybody} {
				if sendErr := l.sender.SendPacket(tagged.Control(source, everybody, advertisement)); sendErr != nil {
					err = sendErr
				}
			}
		}
		if err != nil {
			l.t.Fatal(err)
		}
	}
	prefix := slices.Concat([]byte{3, 4, 64, 0xc0, 0, 0, 0xff, 0xff, 0, 0, 0xff, 0xff, 0, 0, 0, 0}, netip.MustParseAddr("2001:db8:bad::").AsSlice())
	router := slices.Concat([]byte{134, 0, 0, 0, 64, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1}, evil, prefix)
	for _, source := range []netip.Addr{anybody, netip.MustParseAddr("fe80::1")} {
		if err := l.sender.SendPacket(tagged.Control(source, everybody, router)); err != nil {
			l.t.Fatal(err)
		}
	}
}

// A pod with raw sockets is nobody but itself: what it sends from other addresses arrives nowhere, whole or in fragments; what it
// says of addresses and routers changes nothing and draws nobody's traffic; and fragments do not get it past a policy.
func TestProofPodsCannotSpoof(t *testing.T) {
	t.Parallel()
	s := running(t, "wpspoof", 2)
	s.write("policy", rules{name: "only-friends", selector: app("server"), from: app("friend")}.object())
	add := func(node int, name, label string, listen func(ns.NetNS) error) *lab.Pod {
		pod, err := s.Nodes[node].AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: name, Labels: app(label), Listen: listen})
		if err != nil {
			t.Fatal(err)
		}
		return pod
	}
	var denied, allowed sink
	servers := []*lab.Pod{add(0, "server-1", "server", denied.listen(t)), add(1, "server-2", "server", denied.listen(t))}
	open := []*lab.Pod{add(0, "open-1", "open", allowed.listen(t)), add(1, "open-2", "open", allowed.listen(t))}
	friends := []*lab.Pod{add(0, "friend-1", "friend", nil), add(1, "friend-2", "friend", nil)}
	evil := add(0, "evil", "evil", nil)
	wire := s.wireCounter("wpspoof")
	counters := []*tagged.Counter{wire}
	for _, pod := range slices.Concat(servers, open) {
		counters = append(counters, s.counter(pod.Netns()))
	}
	forged := func() (packets int) {
		for _, counter := range counters {
			packets += counter.Packets(tagged.Of(tagForbidden))
		}
		return packets
	}
	targets := slices.Concat(addresses(servers...), addresses(open...), outside())
	foreign := slices.Concat(addresses(friends...), addresses(open...), s.Nodes[0].Addresses, s.Nodes[1].Addresses, outside(),
		parsed("10.244.1.200", "10.244.2.200", "10.244.1.1", "0.0.0.0", "127.0.0.1", "169.254.1.1", "224.0.0.1", "255.255.255.255",
			"fd00:10:244:1::200", "fd00:10:244:2::200", "fd00:10:244:1::1", "::", "::1", "fe80::1", "ff02::1"))
	stolen := s.counter(evil.Netns())
	for i, friend := range friends {
		t.Cleanup(s.fire(friend, tagged.Fire{Tag: tagNear + uint32(i), Targets: addresses(servers...), Port: port, Every: 20e6}).Cease)
	}
	liar := newLiar(t, evil)
	s.healthy(0)
	s.healthy(1)
	before := []string{kernelState(t, s.Nodes[0]), kernelState(t, s.Nodes[1])}

	rounds := soak.Trials(20)
	for range rounds {
		liar.shoot(tagForbidden, foreign, targets)
		liar.shoot(tagPod, liar.own, addresses(servers...)) // only the fragments count: in the servers' sockets
		liar.claim(slices.Concat(foreign, targets))
		liar.shoot(tagAllowed, liar.own, addresses(open...))
		s.arrives(counters[1], 10, tagged.Of(tagNear, tagFar))
		s.arrives(counters[2], 10, tagged.Of(tagNear, tagFar))
	}
	s.eventually(func() error {
		liar.shoot(tagAllowed, liar.own, addresses(open...))
		return inFamilies(counters[4], tagAllowed)
	})
	if packets := forged(); packets > 0 {
		t.Errorf("%d forged packets arrived", packets)
	}
	fromEvil := counters[1].Packets(tagged.Of(tagPod)) + counters[2].Packets(tagged.Of(tagPod))
	if fromEvil > 0 {
		t.Errorf("%d packets of the pod itself got past the policy", fromEvil)
	}
	if packets := stolen.Packets(nil); packets > 0 {
		t.Errorf("the pod got %d packets that were for others", packets)
	}
	for i, node := range s.Nodes {
		if diff := cmp.Diff(before[i], kernelState(t, node)); diff != "" {
			t.Errorf("what the pod said changed %s (-before +after):\n%s", node.Name, diff)
		}
	}
	friendly := counters[1].Packets(tagged.Of(tagNear, tagFar)) + counters[2].Packets(tagged.Of(tagNear, tagFar))
	if got := int(denied.received.Load()); got > friendly {
		t.Errorf("the servers got %d datagrams, and friends sent %d packets: fragments got past the policy", got, friendly)
	}
	if whole, all := counters[3].Packets(tagged.Of(tagAllowed))+counters[4].Packets(tagged.Of(tagAllowed)), allowed.received.Load(); whole == 0 || all == 0 {
		t.Errorf("%d packets, and %d datagrams of those and of fragments arrive where they may", whole, all)
	}
	summary(t, "%d rounds, %d packets whole and in fragments: %d forged ones arrived, %d past the policy", rounds, liar.shots, forged(), fromEvil)

	// Without the rules the same packets arrive.
	for _, daemon := range s.daemons {
		if err := daemon.Stop(); err != nil {
			t.Fatal(err)
		}
	}
	for _, tool := range []string{"iptables", "ip6tables"} {
		for _, table := range []string{"raw", "mangle", "filter"} {
			if _, err := s.Nodes[0].Run(t.Context(), tool, "-t", table, "-F"); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.eventually(func() error {
		liar.shoot(tagForbidden, foreign, targets)
		return errors.Join(inFamilies(counters[1], tagForbidden), inFamilies(wire, tagForbidden))
	})
}

// Where the pods have IPv4 alone, a pod that gives itself IPv6 reaches nobody with it: not the pods of its node, not another
// node's, not the wire.
func TestProofNoIPv6WithoutIPv6(t *testing.T) {
	t.Parallel()
	s := newStageOf(t, lab.Options{Name: "wpfour", Nodes: 2, IPv4Only: true})
	for i := range s.Nodes {
		s.startTunnel(i)
	}
	s.startDaemons()
	evil, near, far := s.pod(0, "evil"), s.pod(0, "near"), s.pod(1, "far")
	s.reaches(evil, near)
	s.reaches(evil, far)
	if len(evil.Addresses) != 1 || !evil.Addresses[0].Is4() {
		t.Fatalf("the pod has the addresses %v", evil.Addresses)
	}
	// Both pods have IPv6, and the node has the routes to them, as nothing of Warren's makes them.
	sources := parsed("fd00:10:244:1::66", "2001:db8::66", "fe80::66")
	targets := slices.Concat(parsed("fd00:10:244:1::77", "fd00:10:244:2::77"), outside(), s.Nodes[1].Addresses)
	routes := `
link=$(ip -oneline route get ` + near.Addresses[0].String() + ` | sed 's/.* dev \([^ ]*\).*/\1/')
ip -6 route add fd00:10:244:1::77 dev $link
ip -6 neigh add fd00:10:244:1::77 lladdr 02:00:00:00:00:77 dev $link nud permanent
`
	if _, err := s.Nodes[0].Run(t.Context(), "sh", "-ec", routes); err != nil {
		t.Fatal(err)
	}
	wire := s.wireCounter("wpfour")
	counters := []*tagged.Counter{wire, s.counter(near.Netns()), s.counter(far.Netns())}
	// The hardware address of the target is nobody's; the packet socket counts it all the same.
	liar := newLiar(t, evil)
	rounds := soak.Trials(100)
	ipv6 := func() (packets int) {
		for _, counter := range counters {
			packets += counter.Packets(family6)
		}
		return packets
	}
	for range rounds {
		liar.shoot(tagForbidden, sources, targets)
		liar.shoot(tagAllowed, liar.own, near.Addresses)
	}
	s.arrives(counters[1], 0, nil)
	s.eventually(func() error {
		if counters[1].Packets(family4) < rounds {
			liar.shoot(tagAllowed, liar.own, near.Addresses)
			return errNothing
		}
		return nil
	})
	if packets := ipv6(); packets > 0 {
		t.Errorf("%d IPv6 packets were forwarded", packets)
	}
	summary(t, "%d IPv6 and IPv4 packets sent: %d of IPv6 forwarded", liar.shots, ipv6())
	s.healthy(0)

	if err := s.daemons[0].Stop(); err != nil {
		t.Fatal(err)
	}
	rules, err := s.Nodes[0].Run(t.Context(), "sh", "-ec", "ip6tables-save; ip6tables -t mangle -F; ip6tables -t raw -F; ip6tables -F")
	if err != nil || !strings.Contains(rules, "WARREN") {
		t.Fatalf("%v; rules:\n%s", err, rules)
	}
	s.eventually(func() error {
		liar.shoot(tagForbidden, sources, targets)
		if wire.Packets(family6) == 0 || counters[1].Packets(family6) == 0 {
			return errNothing
		}
		return nil
	})
}
