package conntrack_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/netip"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/policy"
	"github.com/warren-cni/warren/pkg/testnode"
)

const (
	self = "node-1"
	port = 8080
	// each is how many flows there are of a kind, so that there are 216 of TCP and UDP.
	each = 9
	// stop is how long a forbidden connection may go on.
	stop = time.Second
	// pause is the longest that any other may be without a packet, on a machine that has other work.
	pause = time.Second
)

// node is a node with three pods, a Service in front of the first, and the real rules. Traffic flows between the first and
// each of the others, in both directions and by the Service.
type node struct {
	t        testing.TB
	spaces   map[string]ns.NetNS
	compiler *policy.Compiler
	filter   *firewall.Firewall
	*traffic
}

// Addresses on the node.
func podAddresses(name string) []netip.Addr {
	number := map[string]int{"server": 2, "a": 3, "b": 4, "elsewhere": 99}[name]
	return []netip.Addr{netip.MustParseAddr(fmt.Sprintf("10.0.1.%d", number)), netip.MustParseAddr(fmt.Sprintf("fd00:1::%d", number))}
}

func serviceAddresses() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("10.96.0.1"), netip.MustParseAddr("fd00:96::1")}
}

func pod(name string, set labels.Set) *cluster.Pod {
	return &cluster.Pod{Namespace: "shop", Name: name, Node: self, Labels: set, Addresses: podAddresses(name)}
}

func selector(key, value string) labels.Selector {
	return labels.SelectorFromSet(labels.Set{key: value})
}

// only isolates the server: it talks to the peers chosen, and nobody else.
func only(peers labels.Selector) *cluster.Policy {
	rule := []cluster.Rule{{AnyPort: true, Peers: []cluster.Peer{{Pods: peers}}}}
	return &cluster.Policy{
		Namespace: "shop", Name: "only", Pods: selector("app", "server"), Ingress: true, Egress: true, IngressRules: rule, EgressRules: rule,
	}
}

func newNode(tb testing.TB) *node {
	tb.Helper()
	testnode.Enter(tb)
	n := &node{t: tb, spaces: map[string]ns.NetNS{}, compiler: policy.NewCompiler(self, policy.Options{}), traffic: newTraffic(tb)}
	ready := []netip.Addr{}
	for _, name := range []string{"server", "a", "b"} {
		space := testnode.New(tb)
		n.spaces[name] = space
		ready = append(ready, podAddresses(name)...)
		n.check(podlink.Attach(space.Path(), podlink.Plan(podlink.Spec{
			ContainerID: name, Interface: "eth0", MTU: 1440, Addresses: podAddresses(name),
		})))
		n.check(n.serve(space, port))
	}
	for i, tool := range []string{"iptables", "ip6tables"} {
		for _, protocol := range []string{"tcp", "udp"} {
			n.run(tool, "-t", "nat", "-A", "PREROUTING", "-d", serviceAddresses()[i].String(), "-p", protocol, "--dport", "80",
				"-j", "DNAT", "--to-destination", netip.AddrPortFrom(podAddresses("server")[i], port).String())
		}
		n.run(tool, "-P", "FORWARD", "DROP")
	}
	n.run("sh", "-c", "echo 1 >/proc/sys/net/netfilter/nf_conntrack_tcp_loose")
	var err error
	n.filter, err = firewall.New(tb.Context(), firewall.Options{Log: slog.New(slog.DiscardHandler)})
	n.check(err)
	tb.Cleanup(n.filter.Close)
	everybody := cluster.NewDelta()
	everybody.Namespaces["shop"] = &cluster.Namespace{Name: "shop"}
	for name, role := range map[string]string{"server": "", "a": "friend", "b": "friend"} {
		p := pod(name, labels.Set{"app": name, "role": role})
		everybody.Pods[p.Key()] = p
	}
	n.compiler.Update(everybody)
	_, err = n.filter.Apply(tb.Context(), netfilter.Merge(guard.Compile(guard.Config{
		PodCIDRs:     []netip.Prefix{netip.MustParsePrefix("10.0.1.0/24"), netip.MustParsePrefix("fd00:1::/64")},
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16"), netip.MustParsePrefix("fd00::/16")}, Encrypted: true, Ready: ready,
	}), n.compiler.Ruleset()))
	n.check(err)
	return n
}

func (n *node) check(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

func (n *node) run(words ...string) {
	n.t.Helper()
	if out, err := exec.CommandContext(n.t.Context(), words[0], words[1:]...).CombinedOutput(); err != nil {
		n.t.Fatalf("running %q: %v: %s", words, err, out)
	}
}

// change does what the daemon does: it compiles, patches and sweeps. It returns how long that took.
func (n *node) change(d cluster.Delta) (conntrack.Counts, time.Duration) {
	n.t.Helper()
	began := time.Now() //nolint:forbidigo // a measurement
	update := n.compiler.Update(d)
	_, err := n.filter.Patch(n.t.Context(), update.Change)
	n.check(err)
	counts, err := conntrack.Sweep(n.t.Context(), update.Affected, func(f conntrack.Flow) bool { return n.compiler.Allows(policyFlow(f), nil) })
	n.check(err)
	return counts, time.Since(began)
}

// policyFlow is a connection as policies see it.
func policyFlow(f conntrack.Flow) policy.Flow {
	protocol, ok := map[uint8]cluster.Protocol{unix.IPPROTO_TCP: cluster.TCP, unix.IPPROTO_UDP: cluster.UDP}[f.Protocol]
	if !ok {
		return policy.Flow{Src: f.Src, Dst: f.Dst, Protocol: policy.ICMP}
	}
	return policy.Flow{Src: f.Src, Dst: f.Dst, Protocol: protocol, Port: f.Port}
}

// start opens all flows and waits until they flow.
func (n *node) start() {
	n.t.Helper()
	for family, ip := range []string{"IPv4", "IPv6"} {
		server, service := podAddresses("server")[family], serviceAddresses()[family]
		for _, peer := range []string{"a", "b"} {
			for _, network := range []string{"tcp", "udp"} {
				for range each {
					n.check(n.connect(n.t.Context(), n.spaces[peer], n.add(ip+" "+network+" to the pod", peer), network, netip.AddrPortFrom(server, port)))
					n.check(n.connect(n.t.Context(), n.spaces[peer], n.add(ip+" "+network+" to the Service", peer), network, netip.AddrPortFrom(service, 80)))
					n.check(n.connect(n.t.Context(), n.spaces["server"], n.add(ip+" "+network+" from the pod", peer), network,
						netip.AddrPortFrom(podAddresses(peer)[family], port)))
				}
			}
			n.check(n.ping(n.spaces[peer], n.add(ip+" echo to the pod", peer), server))
			n.check(n.ping(n.spaces["server"], n.add(ip+" echo from the pod", peer), podAddresses(peer)[family]))
		}
	}
	n.flow("a", "b")
}

// counts returns how much arrived at each end of the flows of some peers.
func (n *node) counts(peers ...string) map[string]int {
	counts := map[string]int{}
	for _, f := range n.flows {
		if slices.Contains(peers, f.peer) {
			for i, end := range f.ends() {
				counts[fmt.Sprintf("%d %s with %s, end %d", f.id, f.kind, f.peer, i)] = end.count
			}
		}
	}
	return counts
}

// gap returns the longest time between two arrivals at one end of the flows of a peer since it was asked for last.
func (n *node) gap(peer string) time.Duration {
	var gap time.Duration
	for _, f := range n.flows {
		if f.peer == peer {
			gap = max(gap, f.longest())
		}
	}
	return gap
}

// flow waits until packets arrive at both ends of all flows of some peers. TCP, which has been cut, tries again after seconds.
func (n *node) flow(peers ...string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 30*time.Second)
	defer cancel()
	before := n.counts(peers...)
	n.check(lab.Until(ctx, func() error {
		for name, count := range n.counts(peers...) {
			if count == before[name] {
				return fmt.Errorf("nothing arrives of flow %s", name)
			}
		}
		return nil
	}))
	n.gap("a") // what was until now
}

// cut expects that a change cuts the flows of b in time, at both ends, and leaves those of a alone.
func (n *node) cut(d cluster.Delta) {
	n.t.Helper()
	n.flow("a", "b") // without which nothing below would mean anything
	<-time.After(stop)
	usual := n.gap("a")
	began := time.Now() //nolint:forbidigo // a measurement
	counts, took := n.change(d)
	<-time.After(stop)
	stopped := n.counts("b")
	<-time.After(stop / 2)
	for name, count := range n.counts("b") {
		if count != stopped[name] {
			n.t.Errorf("flow %s goes on after %v", name, stop)
		}
	}
	var last time.Duration
	for _, f := range n.flows {
		for _, end := range f.ends() {
			if f.peer == "b" {
				last = max(last, end.last.Sub(began))
			}
		}
	}
	gap := n.gap("a")
	n.t.Logf("%+v in %v; the last forbidden packet arrived after %v; the longest gap of other flows was %v (%v before the change)",
		counts, took, last, gap, usual)
	if gap > max(pause, 3*usual) {
		n.t.Errorf("nothing arrived of a flow that is allowed for %v", gap)
	}
	if want := len(n.flows) / 2; counts.Cut != want || counts.Lifted != 0 {
		n.t.Errorf("%+v, want %d cut", counts, want)
	}
}

// lift expects that a change lets the flows of b go on.
func (n *node) lift(d cluster.Delta) {
	n.t.Helper()
	counts, _ := n.change(d)
	if want := len(n.flows) / 2; counts.Lifted != want || counts.Cut != 0 {
		n.t.Errorf("%+v, want %d lifted", counts, want)
	}
	n.flow("a", "b")
}

// A change cuts the connections that it forbids, in both directions, and no other; a change back lets the same ones go on.
func TestPolicyCutsWhatItForbids(t *testing.T) {
	n := newNode(t)
	n.start()
	setPolicy := func(p *cluster.Policy) cluster.Delta {
		d := cluster.NewDelta()
		d.Policies[cluster.Key{Namespace: "shop", Name: "only"}] = p
		return d
	}
	setPod := func(p *cluster.Pod) cluster.Delta {
		d := cluster.NewDelta()
		d.Pods[p.Key()] = p
		return d
	}
	b := pod("b", labels.Set{"app": "b", "role": "friend"})
	t.Log("a policy comes")
	n.cut(setPolicy(only(selector("app", "a"))))
	t.Log("and goes")
	n.lift(setPolicy(nil))

	counts, _ := n.change(setPolicy(only(selector("role", "friend"))))
	if counts.Cut != 0 || counts.Judged != len(n.flows) {
		t.Errorf("a policy that allows all: %+v", counts)
	}
	t.Log("a peer's label goes")
	n.cut(setPod(pod("b", labels.Set{"app": "b"})))
	t.Log("and comes back")
	n.lift(setPod(b))
	t.Log("a peer's address changes")
	moved := *b
	moved.Addresses = podAddresses("elsewhere")
	n.cut(setPod(&moved))
	t.Log("and changes back")
	n.lift(setPod(b))
	for _, f := range n.flows {
		if len(f.resets) > 0 {
			t.Errorf("%s with %s ended: %v", f.kind, f.peer, f.resets)
		}
	}
}
