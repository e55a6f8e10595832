package wgdevice_test

import (
	"bufio"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/internal/measure"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// BenchmarkMeshFirst configures a device that has no peers, against a bare client that does the same by one call that replaces all peers, and
// route by route.
func BenchmarkMeshFirst(b *testing.B) {
	for _, peers := range []int{100, 1000, 5000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			n := onBench(b)
			all, pairs := largeMesh(peers), largeMesh(peers)
			pairs.Routes = nil
			none := largeMesh(0)
			var times [4][]time.Duration
			var used [4]time.Duration
			ways := []func(){
				func() { n.apply(b, pairs) },
				func() { n.setconf(b, pairs) },
				func() { n.apply(b, all) },
				func() { n.setconf(b, all) },
			}
			order := []int{0, 1, 2, 3}
			for b.Loop() {
				slices.Reverse(order) // what comes after what must not matter
				for _, i := range order {
					before, began := n.cpu(b), time.Now() //nolint:forbidigo // a measurement
					ways[i]()
					times[i] = append(times[i], time.Since(began))
					used[i] += n.cpu(b) - before
					n.device = wgdevice.New(wgdevice.Options{Log: slog.New(slog.DiscardHandler), Mode: testMode()})
					n.apply(b, none)
				}
			}
			b.ReportMetric(milliseconds(times[0]), "ms/peers")
			b.ReportMetric(milliseconds(times[1]), "ms/setconf")
			b.ReportMetric(milliseconds(times[2]), "ms/all")
			b.ReportMetric(milliseconds(times[0])/milliseconds(times[1]), "x-setconf")
			b.ReportMetric(float64(used[0])/float64(used[1]), "x-setconf-cpu")
			b.ReportMetric(milliseconds(times[2])/milliseconds(times[3]), "x-setconf-routes")
			b.ReportMetric(float64(used[2])/float64(used[3]), "x-setconf-routes-cpu")
		})
	}
}

// BenchmarkMeshChange lets one node join, change its key and leave, and tells of a Node that concerns nobody.
func BenchmarkMeshChange(b *testing.B) {
	for _, peers := range []int{100, 1000, 5000} {
		b.Run(fmt.Sprintf("peers=%d", peers), func(b *testing.B) {
			n := onBench(b)
			without, with := largeMesh(peers), largeMesh(peers+1)
			n.apply(b, without)
			last := with.Peers[peers]
			rekeyed := last
			rekeyed.PublicKey[31]++
			routes := with.Routes[len(without.Routes):]
			changes := []mesh.Change{
				{Peers: []mesh.Peer{last}, Routes: routes},
				{Peers: []mesh.Peer{rekeyed}},
				{RemovedPeers: []mesh.Peer{rekeyed}, RemovedRoutes: routes},
				{},
			}
			var times [4][]time.Duration
			for b.Loop() {
				for turn := range 200 {
					i := turn % len(changes)
					began := time.Now() //nolint:forbidigo // a measurement
					if _, err := n.device.Patch(b.Context(), changes[i], n.key); err != nil {
						b.Fatal(err)
					}
					times[i] = append(times[i], time.Since(began))
				}
			}
			for i, unit := range []string{"ms/join", "ms/key", "ms/leave", "ms/unrelated"} {
				b.ReportMetric(milliseconds(times[i]), unit)
			}
			began := time.Now() //nolint:forbidigo // a measurement
			n.apply(b, without)
			b.ReportMetric(milliseconds([]time.Duration{time.Since(began)}), "ms/audit")
		})
	}
}

// BenchmarkMeshMemory tells what a peer costs the process that runs WireGuard, and what it costs the daemon.
func BenchmarkMeshMemory(b *testing.B) {
	const peers = 5000
	var ours, bare, own float64
	for b.Loop() {
		for _, way := range []struct {
			run    func(*benchNode)
			result *float64
		}{
			{func(n *benchNode) { n.apply(b, largeMesh(peers)) }, &ours},
			{func(n *benchNode) { n.setconf(b, largeMesh(peers)) }, &bare},
		} {
			func() {
				n := onBench(b)
				before, heap := n.resident(b), heapInUse()
				way.run(n)
				*way.result = float64(n.resident(b)-before) / peers
				if way.result == &ours {
					own = float64(heapInUse()-heap) / peers
				}
				runtime.KeepAlive(n)
			}()
		}
	}
	b.ReportMetric(ours/1024, "KB/peer")
	b.ReportMetric(bare/1024, "KB/bare-peer")
	b.ReportMetric(own/1024, "KB/daemon-peer")
}

// benchNode is a node for benchmarks. Its thread is the benchmark's own.
type benchNode struct {
	device *wgdevice.Device
	key    wgdevice.Key
	tunnel *exec.Cmd
}

// onBench takes the benchmark's thread into namespaces of its own and starts the tunnel there. Nobody answers its handshakes.
func onBench(b *testing.B) *benchNode {
	b.Helper()
	runtime.LockOSThread() // never unlocked: the thread ends with the benchmark, and the namespaces with the thread
	netns, err := isolate()
	if err != nil {
		b.Fatalf("making namespaces (this benchmark needs root): %v", err)
	}
	b.Cleanup(func() { _ = unix.Close(netns) })
	lo, err := netlinksafe.LinkByName("lo")
	if err != nil {
		b.Fatal(err)
	}
	if err = netlink.RouteAdd(&netlink.Route{Dst: &net.IPNet{IP: net.IPv4(198, 18, 0, 0), Mask: net.CIDRMask(15, 32)}, LinkIndex: lo.Attrs().Index}); err != nil {
		b.Fatal(err)
	}
	n := &benchNode{device: wgdevice.New(wgdevice.Options{Log: slog.New(slog.DiscardHandler), Mode: testMode()})}
	if n.key, err = keyIn(b.TempDir()); err != nil {
		b.Fatal(err)
	}
	if testMode() == wgdevice.ModeUserspace {
		n.startTunnel(b)
	}
	n.apply(b, largeMesh(0))
	return n
}

func (n *benchNode) startTunnel(b *testing.B) {
	b.Helper()
	n.tunnel = exec.Command("/proc/self/exe")
	n.tunnel.Env = append(os.Environ(), tunnelVariable+"="+string(wgdevice.ModeUserspace))
	n.tunnel.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	output, err := n.tunnel.StdoutPipe()
	if err = errors.Join(err, n.tunnel.Start()); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = n.tunnel.Process.Kill()
		_ = n.tunnel.Wait()
	})
	lines := bufio.NewScanner(output)
	for lines.Scan() {
		if strings.Contains(lines.Text(), "tunnel ready") {
			go func() { // the rest, so that the process never waits for a reader
				for lines.Scan() {
				}
			}()
			return
		}
	}
	b.Fatal("the tunnel ended before it was ready")
}

func (n *benchNode) apply(b *testing.B, c mesh.Config) {
	b.Helper()
	if _, err := n.device.Apply(b.Context(), c, n.key); err != nil {
		b.Fatal(err)
	}
}

// setconf does by hand what makes a device without peers the wanted one.
func (n *benchNode) setconf(b *testing.B, c mesh.Config) {
	b.Helper()
	client, err := wgctrl.New()
	if err != nil {
		b.Fatal(err)
	}
	interval := 25 * time.Second
	config := wgtypes.Config{ReplacePeers: true}
	for _, p := range c.Peers {
		peer := wgtypes.PeerConfig{
			PublicKey: p.PublicKey, Endpoint: net.UDPAddrFromAddrPort(p.Endpoint), PersistentKeepaliveInterval: &interval, ReplaceAllowedIPs: true,
		}
		for _, a := range p.AllowedIPs {
			peer.AllowedIPs = append(peer.AllowedIPs, net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Addr().BitLen())})
		}
		config.Peers = append(config.Peers, peer)
	}
	link, err := netlinksafe.LinkByName(mesh.Link)
	if err = errors.Join(err, client.ConfigureDevice(mesh.Link, config), client.Close()); err != nil {
		b.Fatal(err)
	}
	for _, r := range c.Routes {
		route := &netlink.Route{
			Dst:       &net.IPNet{IP: r.Destination.Addr().AsSlice(), Mask: net.CIDRMask(r.Destination.Bits(), r.Destination.Addr().BitLen())},
			LinkIndex: link.Attrs().Index, Src: r.Source.AsSlice(), Protocol: wgdevice.RouteProtocol,
		}
		if err = netlink.RouteAdd(route); err != nil {
			b.Fatal(err)
		}
	}
}

// cpu returns the processor time that the benchmark and the process that runs WireGuard have used, in a kernel's steps of 10 ms for that.
func (n *benchNode) cpu(b *testing.B) time.Duration {
	b.Helper()
	used := measure.CPU()
	if n.tunnel == nil {
		return used
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", n.tunnel.Process.Pid))
	if err != nil {
		b.Fatal(err)
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:])) // the name may hold anything
	for _, field := range fields[11:13] {                                               // utime and stime, proc(5)
		ticks, err := strconv.Atoi(field)
		if err != nil {
			b.Fatal(err)
		}
		used += time.Duration(ticks) * 10 * time.Millisecond
	}
	return used
}

// resident returns the memory of the process that runs WireGuard, in bytes; that of the kernel's own nobody tells.
func (n *benchNode) resident(b *testing.B) int {
	b.Helper()
	if n.tunnel == nil {
		return 0
	}
	bytes, err := measure.Resident(n.tunnel.Process.Pid)
	if err != nil {
		b.Fatal(err)
	}
	return bytes
}

func heapInUse() int {
	var stats runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&stats)
	return int(stats.HeapAlloc)
}

func milliseconds(times []time.Duration) float64 {
	slices.Sort(times)
	return float64(times[len(times)/2]) / 1e6
}

// largeMesh is the mesh of a node with that many peers, in both families.
func largeMesh(peers int) mesh.Config {
	c := mesh.Config{
		Encrypted: true, ListenPort: wireGuardPort, MTU: 1440,
		PodCIDRs:    []netip.Prefix{netip.MustParsePrefix("10.0.0.0/24"), netip.MustParsePrefix("fd00::/64")},
		Addresses:   []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32"), netip.MustParsePrefix("fd00::1/128")},
		Unreachable: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("fd00::/48")},
	}
	for i := range peers {
		high, low := byte((i+1)>>8), byte(i+1)
		p := mesh.Peer{
			Node:      fmt.Sprintf("node-%05d", i),
			PublicKey: [32]byte{1, high, low},
			Endpoint:  netip.AddrPortFrom(netip.AddrFrom4([4]byte{198, 18, high, low}), wireGuardPort),
			AllowedIPs: []netip.Prefix{
				netip.PrefixFrom(netip.AddrFrom4([4]byte{10, high, low, 0}), 24),
				netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 6: high, 7: low}), 64),
			},
		}
		c.Peers = append(c.Peers, p)
		for j, source := range c.Addresses {
			c.Routes = append(c.Routes, mesh.Route{Destination: p.AllowedIPs[j], Source: source.Addr()})
		}
	}
	return c
}
