package mesh_test

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/measure"
	"github.com/warren-cni/warren/pkg/mesh"
)

// BenchmarkPlanner is what the first plan costs and what a change of one Node does, among 100, 1,000 and 5,000.
func BenchmarkPlanner(b *testing.B) {
	for _, size := range []int{100, 1000, 5000} {
		nodes := crowd(size)
		self := nodes["node-0"]
		newcomer := crowdNode(size)
		rekeyed := crowdNode(size / 2)
		rekeyed.WireGuard.NodeKey = keyOf(size+1, rekeyed.Name)
		original := nodes[rekeyed.Name]
		full := func() *mesh.Planner {
			p := mesh.NewPlanner(self.Name, options())
			p.Update(nodes, mesh.Uplink{MTU: 1500})
			return p
		}
		b.Run(fmt.Sprintf("first/%d", size), func(b *testing.B) {
			defer measure.PerOperation(b)()
			for b.Loop() {
				if p := full(); len(p.Problems()) > 0 {
					b.Fatal(p.Problems()[0])
				}
			}
		})
		// alternates measures two changes that undo each other.
		alternates := func(name string, one, other map[string]*cluster.Node, told int) {
			b.Run(fmt.Sprintf("%s/%d", name, size), func(b *testing.B) {
				p := full()
				defer measure.PerOperation(b)()
				for b.Loop() {
					for _, change := range []map[string]*cluster.Node{one, other} {
						if u := p.Update(change, mesh.Uplink{MTU: 1500}); len(u.Change.Peers)+len(u.Change.RemovedPeers) != told || u.Change.Link {
							b.Fatalf("%d peers change, want %d", len(u.Change.Peers), told)
						}
					}
				}
			})
		}
		alternates("join and leave", map[string]*cluster.Node{newcomer.Name: newcomer}, map[string]*cluster.Node{newcomer.Name: nil}, 1)
		alternates("key change", map[string]*cluster.Node{rekeyed.Name: rekeyed}, map[string]*cluster.Node{rekeyed.Name: original}, 1)
		same := map[string]*cluster.Node{original.Name: original}
		alternates("nothing new", same, same, 0)
		b.Run(fmt.Sprintf("join, whole config/%d", size), func(b *testing.B) {
			p := full()
			p.Config()
			defer measure.PerOperation(b)()
			for b.Loop() {
				p.Update(map[string]*cluster.Node{newcomer.Name: newcomer}, mesh.Uplink{MTU: 1500})
				p.Config()
				p.Problems()
				p.Update(map[string]*cluster.Node{newcomer.Name: nil}, mesh.Uplink{MTU: 1500})
			}
		})
	}
}

// crowd returns that many honest dual-stack nodes.
func crowd(size int) map[string]*cluster.Node {
	nodes := make(map[string]*cluster.Node, size)
	for i := range size {
		n := crowdNode(i)
		nodes[n.Name] = n
	}
	return nodes
}

func crowdNode(i int) *cluster.Node {
	name := fmt.Sprintf("node-%d", i)
	high, low := byte(i>>8), byte(i)
	return &cluster.Node{
		Name: name, UID: uidOf(name), Created: time.Unix(int64(i), 0),
		PodCIDRs: []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, high<<3 | low>>5, low << 3}), 29),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, 0, 0, 0, 0, high, low}), 64),
		},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{172, 16, high, low}), netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: high, 15: low})},
		WireGuard: &cluster.WireGuard{NodeKey: keyOf(i, name), Port: 51820},
	}
}
