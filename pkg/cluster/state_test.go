package cluster_test

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cluster"
)

func addr(text string) netip.Addr { return netip.MustParseAddr(text) }

func node(name string, podCIDRs ...string) *cluster.Node {
	n := &cluster.Node{Name: name}
	for _, p := range podCIDRs {
		n.PodCIDRs = append(n.PodCIDRs, netip.MustParsePrefix(p))
	}
	return n
}

func pod(name, node string, addresses ...string) *cluster.Pod {
	p := &cluster.Pod{Namespace: "shop", Name: name, UID: "uid-" + name, Node: node}
	for _, a := range addresses {
		p.Addresses = append(p.Addresses, addr(a))
	}
	return p
}

func attachment(container, name, uid string, addresses ...string) cluster.Attachment {
	a := cluster.Attachment{ContainerID: container, Interface: "eth0", Namespace: "shop", Name: name, UID: uid}
	for _, x := range addresses {
		a.Addresses = append(a.Addresses, addr(x))
	}
	return a
}

// delta makes a delta of nodes and pods.
func delta(objects ...any) cluster.Delta {
	d := cluster.NewDelta()
	for _, o := range objects {
		switch o := o.(type) {
		case *cluster.Node:
			d.Nodes[o.Name] = o
		case *cluster.Pod:
			d.Pods[o.Key()] = o
		}
	}
	return d
}

// started is a node a with a peer b and the pods given.
func started(pods ...*cluster.Pod) *cluster.State {
	s := cluster.NewState("a")
	update(s, delta(node("a", "10.1.0.0/24"), node("b", "10.2.0.0/24")))
	d := cluster.NewDelta()
	for _, p := range pods {
		d.Pods[p.Key()] = p
	}
	update(s, d)
	return s
}

func update(s *cluster.State, d cluster.Delta) cluster.Bound {
	return s.Update(d, cluster.Attachments{})
}

func attach(s *cluster.State, a cluster.Attachment) cluster.Bound {
	return s.Update(cluster.NewDelta(), cluster.Attachments{List: []cluster.Attachment{a}})
}

func attachAll(s *cluster.State, all []cluster.Attachment) cluster.Bound {
	return s.Update(cluster.NewDelta(), cluster.Attachments{List: all, All: true})
}

// addressesOf returns what a state says of a pod.
func addressesOf(t *testing.T, s *cluster.State, name string) []netip.Addr {
	t.Helper()
	for _, p := range s.Snapshot().Pods {
		if p.Name == name {
			return p.Addresses
		}
	}
	t.Fatalf("no pod %s", name)
	return nil
}

func TestRemotePodHasOnlyAddressesOfItsNode(t *testing.T) {
	s := started(pod("web", "b", "10.2.0.7", "10.1.0.7", "192.0.2.1"))
	if got := addressesOf(t, s, "web"); !slices.Equal(got, []netip.Addr{addr("10.2.0.7")}) {
		t.Errorf("addresses %v", got)
	}
	b := update(s, delta(node("b", "192.0.2.0/24")))
	if got := addressesOf(t, s, "web"); !slices.Equal(got, []netip.Addr{addr("192.0.2.1")}) {
		t.Errorf("addresses %v after the node's podCIDR changed", got)
	}
	if len(b.Pods) != 1 {
		t.Errorf("the delta names %d pods", len(b.Pods))
	}
	update(s, delta(node("a", "192.0.2.0/24")))
	if got := addressesOf(t, s, "web"); len(got) != 0 {
		t.Errorf("addresses %v, which are the own node's", got)
	}
}

// A pod keeps its address where the node gets other podCIDRs, and another node the old ones: there the address is of a pod of its own.
func TestStrayIsNoOtherPod(t *testing.T) {
	s := started(pod("web", "b", "10.2.0.7", "10.2.0.8"))
	expect := func(what string, strays []netip.Addr, want ...string) {
		t.Helper()
		var addresses []netip.Addr
		for _, a := range want {
			addresses = append(addresses, addr(a))
		}
		if got := addressesOf(t, s, "web"); !slices.Equal(got, addresses) || !slices.Equal(s.Strays(), strays) {
			t.Errorf("%s: addresses %v, strays %v, want %v and %v", what, got, s.Strays(), addresses, strays)
		}
	}
	expect("at first", nil, "10.2.0.7", "10.2.0.8")
	attach(s, attachment("c1", "old", "uid-old", "10.2.0.7"))
	expect("with a pod here that has one of them", []netip.Addr{addr("10.2.0.7")}, "10.2.0.8")
	attach(s, attachment("c2", "new", "uid-new", "10.1.0.7"))
	expect("with a pod here that has none of them", []netip.Addr{addr("10.2.0.7")}, "10.2.0.8")
	if key, ok := s.Attached(addr("10.1.0.7")); !ok || key.Name != "new" {
		t.Errorf("10.1.0.7 is attached to %v, %t", key, ok)
	}
	update(s, delta(node("a", "10.2.0.0/29")))
	expect("in podCIDRs that hold it", []netip.Addr{addr("10.1.0.7")}, "10.2.0.8")
	update(s, delta(node("a", "10.1.0.0/24")))
	expect("in those before again", []netip.Addr{addr("10.2.0.7")}, "10.2.0.8")
	attachAll(s, nil)
	expect("when it has ended", nil, "10.2.0.7", "10.2.0.8")
	if key, ok := s.Attached(addr("10.1.0.7")); ok {
		t.Errorf("10.1.0.7 is attached to %v", key)
	}
}

func TestLocalPodHasItsAttachmentsAddresses(t *testing.T) {
	s := started(pod("web", "a", "10.1.0.99"))
	if got := addressesOf(t, s, "web"); len(got) != 0 {
		t.Errorf("addresses %v before it was attached", got)
	}
	b := attach(s, attachment("c1", "web", "another", "10.1.0.5"))
	if len(b.Opened) > 0 || len(b.Pods) > 0 {
		t.Errorf("an attachment of another pod of that name opened %v", b.Opened)
	}
	b = attach(s, attachment("c2", "web", "uid-web", "10.1.0.6"))
	if !slices.Equal(b.Opened, []netip.Addr{addr("10.1.0.6")}) || len(b.Pods) != 1 {
		t.Errorf("opened %v, pods %v", b.Opened, b.Pods)
	}
	if got := s.Open()[addr("10.1.0.6")]; got != (cluster.Holder{ContainerID: "c2", Interface: "eth0"}) {
		t.Errorf("held by %v", got)
	}
	b = update(s, cluster.Delta{Pods: map[cluster.Key]*cluster.Pod{{Namespace: "shop", Name: "web"}: nil}})
	if !slices.Equal(b.Closed, []netip.Addr{addr("10.1.0.6")}) || len(s.Open()) != 0 {
		t.Errorf("closed %v when the pod was gone, still open: %v", b.Closed, s.Open())
	}
}

func TestStaticPodIsKnownByItsOtherUID(t *testing.T) {
	static := pod("proxy", "a")
	static.StaticUID = "hash"
	s := started(static)
	if b := attach(s, attachment("c", "proxy", "hash", "10.1.0.5")); len(b.Opened) != 1 {
		t.Errorf("opened %v", b.Opened)
	}
}

func TestFinishedPodIsClosed(t *testing.T) {
	s := started(pod("job", "a"))
	attach(s, attachment("c", "job", "uid-job", "10.1.0.5"))
	done := pod("job", "a")
	done.Finished = true
	b := update(s, delta(done))
	if !slices.Equal(b.Closed, []netip.Addr{addr("10.1.0.5")}) || len(addressesOf(t, s, "job")) != 0 {
		t.Errorf("closed %v", b.Closed)
	}
}

// The address of a pod that was restarted with another container is opened again: the plugin has closed the gate for it.
func TestAnotherHolderOpensAgain(t *testing.T) {
	s := started(pod("web", "a"), pod("api", "a"))
	attach(s, attachment("c1", "web", "uid-web", "10.1.0.5"))
	b := attach(s, attachment("c2", "web", "uid-web", "10.1.0.5"))
	if !slices.Equal(b.Opened, []netip.Addr{addr("10.1.0.5")}) || len(b.Closed) > 0 {
		t.Errorf("opened %v, closed %v", b.Opened, b.Closed)
	}
	b = attach(s, attachment("c3", "api", "uid-api", "10.1.0.5"))
	if !slices.Equal(b.Opened, []netip.Addr{addr("10.1.0.5")}) || len(addressesOf(t, s, "web")) != 0 {
		t.Errorf("opened %v, and the pod before has %v", b.Opened, addressesOf(t, s, "web"))
	}
	b = attachAll(s, nil)
	if !slices.Equal(b.Closed, []netip.Addr{addr("10.1.0.5")}) || len(b.Opened) > 0 {
		t.Errorf("closed %v, opened %v", b.Closed, b.Opened)
	}
}

func TestNothingNewIsNoChange(t *testing.T) {
	s := started(pod("web", "a"), pod("remote", "b", "10.1.0.9", "10.2.0.9"))
	attachments := []cluster.Attachment{attachment("c1", "web", "uid-web", "10.1.0.5")}
	attachAll(s, attachments)
	if b := attachAll(s, slices.Clone(attachments)); !b.Empty() || len(b.Opened)+len(b.Closed) > 0 {
		t.Errorf("the same attachments gave %+v", b)
	}
	b := update(s, delta(node("b", "10.2.0.0/24")))
	if len(b.Pods) > 0 || len(b.Nodes) != 1 {
		t.Errorf("a node of the same podCIDR gave %+v", b)
	}
}

// Whatever the order of the events, the state is that of somebody who saw only the end.
func TestOrderDoesNotMatter(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	for range 200 {
		s := cluster.NewState("a")
		var attachments []cluster.Attachment
		end := cluster.NewDelta()
		for range 40 {
			switch name := fmt.Sprint("pod", random.IntN(4)); random.IntN(5) {
			case 0:
				n := node([]string{"a", "b"}[random.IntN(2)], fmt.Sprintf("10.%d.0.0/24", random.IntN(3)))
				end.Nodes[n.Name] = n
				update(s, delta(n))
			case 1:
				p := pod(name, []string{"a", "b"}[random.IntN(2)], fmt.Sprintf("10.%d.0.%d", random.IntN(3), random.IntN(5)))
				p.Finished, p.HostNetwork = random.IntN(4) == 0, random.IntN(4) == 0
				end.Pods[p.Key()] = p
				update(s, delta(p))
			case 2:
				gone := cluster.NewDelta()
				key := cluster.Key{Namespace: "shop", Name: name}
				gone.Pods[key], end.Pods[key] = nil, nil
				update(s, gone)
			case 3:
				a := attachment(fmt.Sprint(random.Uint64()), name, "uid-"+name, fmt.Sprintf("10.1.0.%d", random.IntN(5)))
				attachments = slices.DeleteFunc(attachments, func(old cluster.Attachment) bool { return old.Addresses[0] == a.Addresses[0] })
				attachments = append(attachments, a)
				attach(s, a)
			default:
				if len(attachments) > 0 {
					attachments = attachments[1:]
				}
				attachAll(s, attachments)
			}
		}
		fresh := cluster.NewState("a")
		attachAll(fresh, attachments)
		update(fresh, end)
		if diff := cmp.Diff(fresh.Snapshot(), s.Snapshot(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
			cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), emptyIsNil()); diff != "" {
			t.Fatalf("fresh and grown state differ:\n%s", diff)
		}
		if diff := cmp.Diff(fresh.Open(), s.Open(), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
			t.Fatalf("what is open differs:\n%s", diff)
		}
	}
}

// emptyIsNil makes no difference between no addresses and none.
func emptyIsNil() cmp.Option {
	return cmp.FilterValues(func(a, b []netip.Addr) bool { return len(a) == 0 && len(b) == 0 }, cmp.Ignore())
}
