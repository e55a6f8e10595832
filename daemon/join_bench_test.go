package main

import (
	"bufio"
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/reconcile"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// BenchmarkJoin lets one node join, change its key and leave, and tells again of a Node that is as it was: the daemon's whole step, with
// a real packet filter and a real tunnel, among 100 nodes and among 5,000. The processor time is the daemon's alone.
func BenchmarkJoin(b *testing.B) {
	for _, nodes := range []int{100, 5000} {
		b.Run(fmt.Sprintf("nodes=%d", nodes), func(b *testing.B) {
			n, s := newCrowded(b, nodes)
			newcomer, rekeyed := crowdNode(b, nodes, nodes), crowdNode(b, nodes, nodes+1)
			old := crowdNode(b, nodes/2, nodes/2)
			changes := []struct {
				name, node string
				now        *cluster.Node
			}{{"join", newcomer.Name, newcomer}, {"key", newcomer.Name, rekeyed}, {"leave", newcomer.Name, nil}, {"unrelated", old.Name, old}}
			times, processor := make([][]float64, len(changes)), make([][]float64, len(changes))
			for b.Loop() {
				for turn := range 200 {
					i := turn % len(changes)
					s.delta.Nodes[changes[i].node] = changes[i].now
					before, began := reconcile.ProcessorTime(), time.Now() //nolint:forbidigo // a measurement
					if err := n.step(b.Context(), false); err != nil {
						b.Fatal(err)
					}
					times[i] = append(times[i], time.Since(began).Seconds()*1000)
					processor[i] = append(processor[i], float64((reconcile.ProcessorTime()-before).Microseconds())/1000)
				}
			}
			for i, c := range changes {
				slices.Sort(times[i])
				slices.Sort(processor[i])
				b.ReportMetric(times[i][len(times[i])/2], "ms/"+c.name)
				b.ReportMetric(processor[i][len(processor[i])/2], "cpu-ms/"+c.name)
			}
		})
	}
}

// newCrowded returns a node that has taken its first whole step among that many others, with the benchmark's thread in namespaces of its own.
func newCrowded(b *testing.B, nodes int) (*node, *told) {
	b.Helper()
	isolate(b)
	n, s, _, _ := newStepped(b, "192.0.2.1", netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/32"))
	startTunnel(b)
	n.tunnel = wgdevice.New(wgdevice.Options{Log: n.log, Mode: wgdevice.ModeUserspace})
	n.follower = newFollower(n.tunnel, n.clock, n.renewMesh, n.log)
	filter, err := firewall.New(b.Context(), firewall.Options{Log: slog.New(slog.DiscardHandler), Admit: n.admit, Now: n.clock})
	if err != nil {
		b.Fatal(err)
	}
	n.filter = filter
	for i := range nodes {
		other := crowdNode(b, i, i)
		s.delta.Nodes[other.Name] = other
	}
	if err := n.step(b.Context(), true); err != nil {
		b.Fatal(err)
	}
	if o := n.outcomeNow(); len(o.mesh.Peers) != nodes || len(o.problems) > 0 {
		b.Fatalf("%d peers, want %d; problems: %v", len(o.mesh.Peers), nodes, o.problems)
	}
	return n, s
}

// isolate takes the benchmark's thread into namespaces of its own. It is never unlocked: it ends with the benchmark, and they with it.
func isolate(b *testing.B) {
	b.Helper()
	runtime.LockOSThread()
	err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS)
	if err == nil {
		err = errors.Join(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""), unix.Mount("tmpfs", "/run", "tmpfs", 0, ""))
	}
	if err != nil {
		b.Fatalf("making namespaces (this benchmark needs root): %v", err)
	}
}

// startTunnel starts the tunnel in the namespaces of the calling thread, and waits until it is there.
func startTunnel(b *testing.B) {
	b.Helper()
	binaries, err := programs.Dir(context.WithoutCancel(b.Context()))
	if err != nil {
		b.Fatal(err)
	}
	tunnel := exec.CommandContext(b.Context(), filepath.Join(binaries, "warrend"), "tunnel", "--wireguard", "userspace")
	tunnel.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	output, err := tunnel.StderrPipe()
	if err = errors.Join(err, tunnel.Start()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = tunnel.Wait() })
	lines := bufio.NewScanner(output)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "tunnel ready") {
			go func() { // the rest, so that it never waits for a reader
				for lines.Scan() {
				}
			}()
			return
		}
	}
	b.Fatal("the tunnel ended before it was ready")
}

// crowdNode returns the node of that number, with the key of a number.
func crowdNode(tb testing.TB, number, key int) *cluster.Node {
	tb.Helper()
	name, high, low := fmt.Sprintf("crowd-%05d", number), byte((number+1)>>8), byte(number+1)
	private := [32]byte{31: 0x40, 1: byte((key + 1) >> 8), 2: byte(key + 1)}
	public, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		tb.Fatal(err)
	}
	proof, err := keyproof.Sign(private, name, name)
	if err != nil {
		tb.Fatal(err)
	}
	return &cluster.Node{
		Name: name, UID: name, Created: time.Unix(int64(number), 0),
		PodCIDRs: []netip.Prefix{
			netip.PrefixFrom(netip.AddrFrom4([4]byte{10, high, low, 0}), 24),
			netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 6: high, 7: low}), 64),
		},
		Addresses: []netip.Addr{netip.AddrFrom4([4]byte{198, 18, high, low}), netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, 14: high, 15: low})},
		WireGuard: &cluster.WireGuard{NodeKey: cluster.NodeKey{PublicKey: [32]byte(public.PublicKey().Bytes()), Proof: proof}, Port: 51820},
	}
}
