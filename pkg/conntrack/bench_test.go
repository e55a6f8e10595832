package conntrack_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/testnode"
)

// crowd makes many connections of others.
func crowd(b *testing.B, connections int) {
	b.Helper()
	handle, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		b.Fatal(err)
	}
	defer handle.Close()
	for i := range connections {
		client, server := net.IPv4(10, 1, byte(i>>8), byte(i)).To4(), net.IPv4(10, 2, 0, byte(i>>16)).To4()
		err = handle.ConntrackCreate(netlink.ConntrackTable, unix.AF_INET, &netlink.ConntrackFlow{
			FamilyType: unix.AF_INET, TimeOut: 1000,
			Forward: netlink.IPTuple{SrcIP: client, DstIP: server, SrcPort: uint16(i), DstPort: 80, Protocol: unix.IPPROTO_UDP},
			Reverse: netlink.IPTuple{SrcIP: server, DstIP: client, SrcPort: 80, DstPort: uint16(i), Protocol: unix.IPPROTO_UDP},
		})
		if err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRevoke forbids one established flow among many, and takes the time until its last packet passes.
func BenchmarkRevoke(b *testing.B) {
	for _, connections := range []int{100, 120_000} {
		b.Run(fmt.Sprintf("connections=%d", connections), func(b *testing.B) {
			n := newNode(b)
			crowd(b, connections)
			arrived := n.stream(500 * time.Microsecond)
			forbid, allow := cluster.NewDelta(), cluster.NewDelta()
			key := cluster.Key{Namespace: "shop", Name: "only"}
			forbid.Policies[key], allow.Policies[key] = only(selector("app", "a")), nil
			var times []time.Duration
			for b.Loop() {
				n.change(allow)
				<-arrived // it flows
				for len(arrived) > 0 {
					<-arrived
				}
				began := time.Now() //nolint:forbidigo // a measurement
				if counts, _ := n.change(forbid); counts.Cut != 1 {
					b.Fatalf("%+v", counts)
				}
				var last time.Duration
				for quiet := false; !quiet; {
					select {
					case at := <-arrived:
						last = max(last, at.Sub(began))
					case <-time.After(20 * time.Millisecond):
						quiet = true
					}
				}
				times = append(times, last)
			}
			slices.Sort(times)
			b.ReportMetric(float64(times[len(times)/2].Microseconds())/1000, "p50-ms")
			b.ReportMetric(float64(times[len(times)*99/100].Microseconds())/1000, "p99-ms")
		})
	}
}

// stream sends from pod b to the server, which answers each packet, and returns when packets arrive at either end.
func (n *node) stream(interval time.Duration) <-chan time.Time {
	n.t.Helper()
	const streamPort = 9090
	var server net.PacketConn
	var client net.Conn
	n.check(n.spaces["server"].Do(func(ns.NetNS) (err error) {
		server, err = new(net.ListenConfig).ListenPacket(n.t.Context(), "udp4", fmt.Sprintf(":%d", streamPort))
		return err
	}))
	n.check(n.spaces["b"].Do(func(ns.NetNS) (err error) {
		client, err = new(net.Dialer).DialContext(n.t.Context(), "udp4", netip.AddrPortFrom(podAddresses("server")[0], streamPort).String())
		return err
	}))
	n.keep(server)
	n.keep(client)
	arrived := make(chan time.Time, 1<<20)
	n.running.Go(func() {
		for buffer := make([]byte, 4); ; {
			count, from, err := server.ReadFrom(buffer)
			if err == nil {
				arrived <- time.Now() //nolint:forbidigo // a measurement
				_, err = server.WriteTo(buffer[:count], from)
			}
			if err != nil {
				return
			}
		}
	})
	n.running.Go(func() {
		for buffer := make([]byte, 4); ; {
			if _, err := client.Read(buffer); err != nil {
				return
			}
			arrived <- time.Now() //nolint:forbidigo // a measurement
		}
	})
	n.running.Go(func() {
		ticker := time.NewTicker(interval)
		defer ticker.Stop()
		for range ticker.C {
			if _, err := client.Write(binary.BigEndian.AppendUint32(nil, 0)); err != nil {
				return
			}
		}
	})
	return arrived
}

// BenchmarkSweep looks for the connections of one pod, of one family and of both, and for those of many.
func BenchmarkSweep(b *testing.B) {
	many := []netip.Addr{}
	for i := range 50 {
		many = append(many, netip.AddrFrom4([4]byte{10, 3, 0, byte(i)}))
	}
	for _, connections := range []int{0, 1000, 10_000, 120_000} {
		for name, addresses := range map[string][]netip.Addr{"one": many[:1], "dual": {many[0], netip.IPv6Unspecified().Next()}, "many": many} {
			b.Run(fmt.Sprintf("connections=%d/pods=%s", connections, name), func(b *testing.B) {
				testnode.Enter(b)
				crowd(b, connections)
				for b.Loop() {
					if _, err := conntrack.Sweep(b.Context(), addresses, func(conntrack.Flow) bool { return true }); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// BenchmarkForget deletes the connections of an address, of which there are none.
func BenchmarkForget(b *testing.B) {
	for _, connections := range []int{0, 120_000} {
		for name, addresses := range map[string][]netip.Addr{
			"ipv4": {netip.MustParseAddr("10.0.0.2")}, "dual": {netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")},
		} {
			b.Run(fmt.Sprintf("connections=%d/%s", connections, name), func(b *testing.B) {
				testnode.Enter(b)
				crowd(b, connections)
				for b.Loop() {
					if err := conntrack.Forget(addresses); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
