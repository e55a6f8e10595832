package main

import (
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

const (
	// batch is how many pods are added at once.
	batch = 20
	// perNode is how many pods are added to a node: with more, addresses would have to cool down.
	perNode = 200
	// window is how many addresses are fired at, from the one after the last that was leased; the pods of a batch get theirs there.
	window = batch + 4
)

// Translations of whole networks that stand for Services: an address of the left one leads to the address of the right one.
const serviceNetworks = `
iptables -t nat -A PREROUTING -d 10.96.1.0/24 -j NETMAP --to 10.244.1.0/24
iptables -t nat -A PREROUTING -d 10.96.2.0/24 -j NETMAP --to 10.244.2.0/24
ip6tables -t nat -A PREROUTING -d fd00:96:1::/64 -j NETMAP --to fd00:10:244:1::/64
ip6tables -t nat -A PREROUTING -d fd00:96:2::/64 -j NETMAP --to fd00:10:244:2::/64`

// serviceOf returns the address of the Service that leads to a pod's address.
func serviceOf(address netip.Addr) netip.Addr {
	network := netip.MustParseAddr("10.96.0.0")
	from, to := 2, 4
	if address.Is6() {
		network, from, to = netip.MustParseAddr("fd00:96::"), 6, 16
	}
	bytes := network.AsSlice()
	if address.Is6() {
		copy(bytes[4:6], address.AsSlice()[from:8]) // the node's number
		from = 8
	}
	copy(bytes[from:to], address.AsSlice()[from:to])
	service, _ := netip.AddrFromSlice(bytes)
	return service
}

// withServices adds the Services of addresses.
func withServices(list []netip.Addr) []netip.Addr {
	all := slices.Clone(list)
	for _, address := range list {
		all = append(all, serviceOf(address))
	}
	return all
}

// newcomer is a pod that is added under fire, and fires itself.
type newcomer struct {
	pod     *lab.Pod
	tag     uint32
	counter *tagged.Counter
	gun     *tagged.Gun
}

// Pods are added, twenty at a time, while pods of the same and of another node fire at the addresses that they will get, also
// through Services; and they fire back from the first moment at which they have an address. Two of three are isolated both
// ways: not one packet reaches them, and none of theirs arrives. The others prove that it would.
func TestProofNoStartRace(t *testing.T) {
	t.Parallel()
	var all startCounts
	for pods := soak.Trials(500); pods > 0; pods -= perNode {
		startUnderFire(t, min(pods, perNode), &all)
	}
	if all.in > 0 || all.out > 0 {
		t.Errorf("isolated pods got %d packets, and %d of theirs arrived", all.in, all.out)
	}
	summary(t, "%d pods added %d at a time, %d of them isolated: %d packets reached those, %d of theirs arrived",
		all.pods, batch, all.isolated, all.in, all.out)
}

// startCounts count pods, and packets into and out of those that are isolated.
type startCounts struct{ pods, isolated, in, out int }

// startUnderFire adds pods on a new node.
func startUnderFire(t *testing.T, pods int, all *startCounts) {
	t.Helper()
	s := running(t, "wpstart", 2)
	for _, node := range s.Nodes {
		if _, err := node.Run(t.Context(), "sh", "-ec", serviceNetworks); err != nil {
			t.Fatal(err)
		}
	}
	s.write("policy", rules{name: "isolate-closed", selector: app("closed"), both: true}.object())
	near, far := s.pod(0, "near"), s.pod(1, "far")
	neighbours := []*lab.Pod{near, far}
	counters := []*tagged.Counter{s.counter(near.Netns()), s.counter(far.Netns())}

	for tag := tagPod; int(tag-tagPod) < pods; tag += batch {
		targets := window4and6(near, tag)
		var guns []*tagged.Gun
		for i, from := range neighbours {
			guns = append(guns, s.fire(from, tagged.Fire{
				Tag: tagNear + uint32(i), Targets: withServices(targets), Port: port, Every: 2 * time.Millisecond, Salvo: 12,
			}))
		}
		for _, n := range s.addBatch(tag, withServices(addresses(near, far))) {
			if !slices.Contains(targets, n.pod.Addresses[0]) {
				t.Errorf("%s has %v, at which nobody fires", n.pod.Name, n.pod.Addresses)
			}
			all.pods++
			if n.isolated() {
				all.isolated++
				all.in += n.counter.Packets(nil)
				all.out += counters[0].Packets(tagged.Of(n.tag)) + counters[1].Packets(tagged.Of(n.tag))
			} else {
				s.eventually(func() error { return n.reachedBothWays(neighbours, counters) })
			}
			n.gun.Cease()
			s.endCount(n.counter)
			if err := n.pod.Delete(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		for _, g := range guns {
			g.Cease()
		}
	}
}

// reachedBothWays is an error unless the pod and its neighbours have got packets from each other, in both families and by all
// protocols.
func (n *newcomer) reachedBothWays(neighbours []*lab.Pod, counters []*tagged.Counter) error {
	for i, counter := range counters {
		if err := inFamilies(counter, n.tag); err != nil {
			return fmt.Errorf("at %s: %w", neighbours[i].Name, err)
		}
		if err := inFamilies(n.counter, tagNear+uint32(i)); err != nil {
			return fmt.Errorf("at %s: %w", n.pod.Name, err)
		}
	}
	return nil
}

// window4and6 are the addresses that the pods of a batch can get. The first pod of the node has the second address.
func window4and6(first *lab.Pod, tag uint32) []netip.Addr {
	var list []netip.Addr
	for _, address := range first.Addresses {
		for range tag - tagPod {
			address = address.Next()
		}
		for range window {
			address = address.Next()
			list = append(list, address)
		}
	}
	return list
}

// isolated says whether a policy isolates the pod.
func (n *newcomer) isolated() bool { return n.tag%3 > 0 }

// addBatch adds pods at once and fires from them at the targets from their first instant.
func (s *stage) addBatch(first uint32, targets []netip.Addr) []*newcomer {
	s.t.Helper()
	list := make([]*newcomer, batch)
	errs := make([]error, batch)
	var group sync.WaitGroup
	for i := range list {
		n := &newcomer{tag: first + uint32(i)}
		list[i] = n
		name := map[bool]string{true: "closed", false: "open"}[n.isolated()]
		group.Go(func() {
			n.pod, errs[i] = s.Nodes[0].AddPod(s.t.Context(), lab.Pod{
				Namespace: "shop", Name: fmt.Sprintf("%s-%d", name, n.tag), Labels: app(name),
				Listen: func(netns ns.NetNS) (err error) {
					if n.counter, err = tagged.Count(netns); err != nil {
						return err
					}
					n.gun, err = tagged.Start(s.t.Context(), netns, tagged.Fire{Tag: n.tag, Targets: targets, Port: port, Every: 5 * time.Millisecond, Salvo: 6})
					return err
				},
			})
		})
	}
	group.Wait()
	for _, err := range errs {
		if err != nil {
			s.t.Fatal(err)
		}
	}
	return list
}

// endCount ends a count that is proof only if it saw everything.
func (s *stage) endCount(counter *tagged.Counter) {
	s.t.Helper()
	if err := counter.Stop(); err != nil {
		s.t.Error(err)
	}
}
