package policy_test

import (
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/oracle"
	"github.com/warren-cni/warren/pkg/internal/world"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// TestProofPacketsAgreeWithOracle puts the rules of random clusters into a real node, one after the other, and sends what begins
// every connection between its pods and everybody: what the oracle allows arrives, and nothing else.
func TestProofPacketsAgreeWithOracle(t *testing.T) {
	n := newNode(t)
	clusters, seed := soak.Trials(2000), rand.Uint64()
	begins := leaving(everybody())
	if got := len(n.send(begins)); got != len(begins) {
		t.Fatalf("%d of %d packets arrive where there are no rules yet", got, len(begins))
	}
	n.script("iptables -P FORWARD DROP; ip6tables -P FORWARD DROP")
	writer, err := firewall.New(t.Context(), firewall.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	counts := map[string]int{}
	for i := range clusters {
		r := rand.New(rand.NewPCG(seed, uint64(i)))
		s := world.New(r)
		n.judge(writer, s, readyIn(s, r), counts)
		if t.Failed() {
			t.Fatalf("in world %d of seed %d", i, seed)
		}
	}
	t.Logf("proof: %d random clusters, 0 packets that the oracle judges otherwise; seed %d: %v", clusters, seed, counts)
	for _, f := range netfilter.Families {
		for _, protocol := range []cluster.Protocol{cluster.TCP, cluster.UDP, cluster.SCTP, oracle.ICMP} {
			for _, allowed := range []bool{true, false} {
				if k := kind(f, protocol, allowed); counts[k] < clusters {
					t.Errorf("seed %d: %d packets that are %s is too little to prove anything", seed, counts[k], k)
				}
			}
		}
	}
}

// kind is what packets are counted by.
func kind(f netfilter.Family, protocol cluster.Protocol, allowed bool) string {
	return fmt.Sprintf("%s %s %s", f, protocol, map[bool]string{true: "allowed", false: "denied"}[allowed])
}

// everybody is a world with all pods that any world may have on this node, and one elsewhere.
func everybody() cluster.Snapshot {
	s := cluster.Snapshot{Self: world.Self, Pods: []cluster.Pod{{Node: world.Other, Addresses: podAddresses(2, 0)}}}
	for i := range maxPods {
		s.Pods = append(s.Pods, cluster.Pod{Node: world.Self, Addresses: podAddresses(1, i)})
	}
	return s
}

// leaving are the connections of a world that leave their pod.
func leaving(s cluster.Snapshot) []oracle.Flow {
	return slices.DeleteFunc(flows(interfaces(s)), func(f oracle.Flow) bool { return f.Src == f.Dst })
}

// judge gives a world's rules to the node and compares what arrives with the oracle.
func (n *node) judge(writer *firewall.Firewall, s cluster.Snapshot, ready []netip.Addr, counts map[string]int) {
	n.t.Helper()
	rules, problems := policy.Compile(s)
	all := netfilter.Merge(guard.Compile(guard.Config{
		PodCIDRs: prefixes("10.0.1.0/24", "fd00:1::/64"), ClusterCIDRs: prefixes("10.0.0.0/16", "fd00::/16"),
		KnownPodCIDRs: prefixes("10.0.1.0/24", "10.0.2.0/24", "fd00:1::/64", "fd00:2::/64"), Encrypted: true, Ready: ready,
	}), rules)
	if _, err := writer.Apply(n.t.Context(), all); err != nil {
		n.t.Fatal(err)
	}
	// What the last world allowed is no connection of this one.
	if err := netlink.ConntrackTableFlush(netlink.ConntrackTable); err != nil {
		n.t.Fatal(err)
	}
	places, begins := interfaces(s), leaving(s)
	arrived := n.send(begins)
	for _, f := range begins {
		want := oracle.Allowed(s, f) && open(ready, places, f.Src) && open(ready, places, f.Dst)
		if arrived[f] != want {
			n.t.Errorf("%s %s -> %s port %d: it arrives: %v, the oracle says %v", f.Protocol, f.Src, f.Dst, f.Port, arrived[f], want)
		}
		counts[kind(netfilter.FamilyOf(f.Src), f.Protocol, want)]++
	}
	if n.t.Failed() {
		n.t.Logf("%s\n%v\nready %v\n%s", describe(s), problems, ready, all.Render())
	}
}
