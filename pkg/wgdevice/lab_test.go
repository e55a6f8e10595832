package wgdevice_test

import (
	"bufio"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// The lab: nodes are network and mount namespaces, joined by a bridge in a namespace of its own, which is the wire. Each
// namespace lives as long as one thread of the test, so that nothing is left whatever happens.

// modeVariable chooses the implementation under test: "kernel" in the virtual machine, user space elsewhere.
const modeVariable = "WARREN_TEST_WIREGUARD"

// tunnelVariable makes the test's binary run the user-space tunnel instead of tests.
const tunnelVariable = "WARREN_TEST_TUNNEL"

const wireGuardPort = 51820

func TestMain(m *testing.M) {
	if os.Getenv(tunnelVariable) == "" {
		os.Exit(m.Run())
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	log := slog.New(slog.NewTextHandler(os.Stdout, nil))
	err := runTunnel(ctx, log, wgdevice.Mode(os.Getenv(tunnelVariable)))
	stop()
	if err != nil {
		log.Error("tunnel ended", "error", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// runTunnel runs the tunnel itself, or what decides whether one is needed and then runs it.
func runTunnel(ctx context.Context, log *slog.Logger, mode wgdevice.Mode) error {
	if mode == wgdevice.ModeUserspace {
		return wgdevice.RunTunnel(ctx, log)
	}
	if err := os.Setenv(tunnelVariable, string(wgdevice.ModeUserspace)); err != nil {
		return err
	}
	return wgdevice.SuperviseTunnel(ctx, wgdevice.Options{Log: log, Mode: mode}, []string{"/proc/self/exe"})
}

// testMode returns the implementation under test.
func testMode() wgdevice.Mode {
	if os.Getenv(modeVariable) == string(wgdevice.ModeKernel) {
		return wgdevice.ModeKernel
	}
	return wgdevice.ModeUserspace
}

// node is a host on the wire, with a mesh device.
type node struct {
	*host
	number byte
	key    wgdevice.Key
	device *wgdevice.Device
	tunnel *exec.Cmd
}

// lab is a wire with nodes on it.
type lab struct {
	wire  *host
	nodes []*node
}

// newLab returns a wire with that many nodes, and their tunnels where WireGuard runs in user space.
func newLab(t *testing.T, size int) *lab {
	t.Helper()
	l := &lab{wire: newHost(t)}
	l.wire.do(t, func() error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = "wire"
		bridge := &netlink.Bridge{LinkAttrs: attrs}
		return errors.Join(netlink.LinkAdd(bridge), netlink.LinkSetUp(bridge))
	})
	for i := range size {
		l.nodes = append(l.nodes, l.addNode(t, byte(i+1)))
	}
	return l
}

func (l *lab) addNode(t *testing.T, number byte) *node {
	t.Helper()
	n := &node{host: newHost(t), number: number, device: newDevice(t, testMode())}
	key, err := keyIn(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	n.key = key
	l.wire.do(t, func() error { return plug(n.netns, number) })
	n.do(t, func() error { return setUpUplink(number) })
	n.do(t, echo)
	n.startTunnel(t, testMode())
	return n
}

func newDevice(t *testing.T, mode wgdevice.Mode) *wgdevice.Device {
	t.Helper()
	return wgdevice.New(wgdevice.Options{Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Mode: mode})
}

// plug joins a namespace to the bridge by a veth.
func plug(netns int, number byte) error {
	bridge, err := netlinksafe.LinkByName("wire")
	if err != nil {
		return err
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = fmt.Sprintf("port%d", number)
	attrs.MasterIndex = bridge.Attrs().Index
	port := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(netns)}
	return errors.Join(netlink.LinkAdd(port), netlink.LinkSetUp(port))
}

func uplink(number byte) (v4, v6 netip.Addr) {
	return netip.AddrFrom4([4]byte{192, 0, 2, number}), netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 15: number})
}

// setUpUplink gives a node its addresses, and a default route to another node, so that what no route takes is seen on the wire.
// Reverse-path filtering is strict, as some distributions have it.
func setUpUplink(number byte) error {
	for _, name := range []string{"all", "default", "eth0"} {
		if err := os.WriteFile("/proc/sys/net/ipv4/conf/"+name+"/rp_filter", []byte("1"), 0); err != nil {
			return err
		}
	}
	link, err := netlinksafe.LinkByName("eth0")
	if err != nil {
		return err
	}
	v4, v6 := uplink(number)
	gateway := byte(1)
	if number == 1 {
		gateway = 2
	}
	gateway4, gateway6 := uplink(gateway)
	return errors.Join(
		netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: v4.AsSlice(), Mask: net.CIDRMask(24, 32)}}),
		netlink.AddrAdd(link, &netlink.Addr{IPNet: &net.IPNet{IP: v6.AsSlice(), Mask: net.CIDRMask(64, 128)}, Flags: unix.IFA_F_NODAD}),
		netlink.LinkSetUp(link),
		netlink.RouteAdd(&netlink.Route{Gw: gateway4.AsSlice(), LinkIndex: link.Attrs().Index}),
		netlink.RouteAdd(&netlink.Route{Gw: gateway6.AsSlice(), LinkIndex: link.Attrs().Index}))
}

// echo answers datagrams with what came and from whom, and connections with the hash of what came.
func echo() error {
	datagrams, err := net.ListenUDP("udp", &net.UDPAddr{Port: 7})
	if err != nil {
		return err
	}
	go func() {
		buffer := make([]byte, 2048)
		for {
			n, from, errRead := datagrams.ReadFromUDPAddrPort(buffer)
			if errRead != nil {
				return
			}
			_, _ = datagrams.WriteToUDPAddrPort(append(buffer[:n:n], from.Addr().Unmap().String()...), from)
		}
	}()
	connections, err := net.ListenTCP("tcp", &net.TCPAddr{Port: 7})
	if err != nil {
		return err
	}
	go func() {
		for {
			c, errAccept := connections.Accept()
			if errAccept != nil {
				return
			}
			hash := sha256.New()
			_, _ = io.Copy(hash, c)
			_, _ = c.Write(hash.Sum(nil))
			_ = c.Close()
		}
	}()
	return nil
}

// startTunnel starts the user-space tunnel of a node in a process of its own and waits until it is ready. It does nothing
// for the kernel.
func (n *node) startTunnel(t *testing.T, mode wgdevice.Mode) {
	t.Helper()
	if mode == wgdevice.ModeKernel {
		return
	}
	output := n.start(t, mode)
	for output.Scan() {
		if strings.Contains(output.Text(), "tunnel ready") {
			go func() { // the rest, so that the process never waits for a reader
				for output.Scan() {
				}
			}()
			return
		}
		t.Logf("tunnel: %s", output.Text())
	}
	t.Fatal("the tunnel ended before it was ready")
}

// start starts the tunnel's process in the node's namespaces.
func (n *node) start(t *testing.T, mode wgdevice.Mode) *bufio.Scanner {
	t.Helper()
	output := in(t, n.host, func() (io.Reader, error) {
		n.tunnel = exec.Command("/proc/self/exe")
		n.tunnel.Env = append(os.Environ(), tunnelVariable+"="+string(mode))
		n.tunnel.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		pipe, err := n.tunnel.StdoutPipe()
		return pipe, errors.Join(err, n.tunnel.Start())
	})
	process := n.tunnel
	t.Cleanup(func() {
		_ = process.Process.Kill()
		_ = process.Wait()
	})
	return bufio.NewScanner(output)
}

// signalTunnel ends the tunnel's process and returns how it ended.
func (n *node) signalTunnel(t *testing.T, s os.Signal) error {
	t.Helper()
	if err := n.tunnel.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
	return n.tunnel.Wait()
}

// snapshot returns the cluster as node self sees it, with the given nodes.
func snapshot(t *testing.T, self *node, nodes ...*node) cluster.Snapshot {
	t.Helper()
	s := cluster.Snapshot{Self: self.name()}
	for _, n := range nodes {
		v4, v6 := uplink(n.number)
		own4, own6 := n.podCIDRs()
		proof, err := n.key.Proof(n.name(), "")
		if err != nil {
			t.Fatal(err)
		}
		s.Nodes = append(s.Nodes, cluster.Node{
			Name:      n.name(),
			PodCIDRs:  []netip.Prefix{own4, own6},
			Addresses: []netip.Addr{v4, v6},
			WireGuard: &cluster.WireGuard{NodeKey: cluster.NodeKey{PublicKey: n.key.Public(), Proof: proof}, Port: wireGuardPort},
		})
	}
	return s
}

func (n *node) name() string { return fmt.Sprintf("node-%d", n.number) }

func (n *node) podCIDRs() (v4, v6 netip.Prefix) {
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{10, 244, n.number, 0}), 24),
		netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 7: n.number}), 64)
}

// addresses are the node's own in the mesh.
func (n *node) addresses() (v4, v6 netip.Addr) {
	own4, own6 := n.podCIDRs()
	return own4.Addr().Next(), own6.Addr().Next()
}

// plan returns the mesh of a node that knows the given nodes.
func (n *node) plan(t *testing.T, nodes ...*node) mesh.Config {
	t.Helper()
	return n.planWith(t, true, nodes...)
}

func (n *node) planWith(t *testing.T, encrypted bool, nodes ...*node) mesh.Config {
	t.Helper()
	c, problems := mesh.Plan(snapshot(t, n, nodes...), mesh.Options{
		ClusterCIDRs: []netip.Prefix{pods4, pods6}, ListenPort: wireGuardPort, Uplink: mesh.Uplink{MTU: 1500}, Encrypted: encrypted,
	})
	if len(problems) > 0 {
		t.Fatalf("planning: %v", problems)
	}
	return c
}

// apply applies a mesh on a node.
func (n *node) apply(t *testing.T, c mesh.Config) wgdevice.Changes {
	t.Helper()
	return in(t, n.host, func() (wgdevice.Changes, error) { return n.device.Apply(t.Context(), c, n.key) })
}

// joinAll applies the mesh of all nodes on each of them.
func (l *lab) joinAll(t *testing.T, encrypted bool) {
	t.Helper()
	for _, n := range l.nodes {
		n.apply(t, n.planWith(t, encrypted, l.nodes...))
	}
}

func (n *node) status(t *testing.T) wgdevice.Status {
	t.Helper()
	return in(t, n.host, func() (wgdevice.Status, error) { return n.device.Status(t.Context()) })
}

// ask sends a marked datagram to an address until an answer comes, at most that often, and returns the address that the
// other side saw.
func (n *node) ask(to netip.Addr, marker string, attempts int) (netip.Addr, error) {
	return try(n.host, func() (netip.Addr, error) {
		c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(netip.AddrPortFrom(to, 7)))
		if err != nil {
			return netip.Addr{}, err
		}
		defer func() { _ = c.Close() }()
		buffer := make([]byte, 2048)
		for range attempts {
			var size int
			if err = c.SetReadDeadline(time.Now().Add(400 * time.Millisecond)); err != nil { //nolint:forbidigo // a socket's deadline
				return netip.Addr{}, err
			}
			if _, err = c.Write([]byte(marker)); err != nil {
				continue
			}
			if size, err = c.Read(buffer); err == nil {
				return netip.ParseAddr(strings.TrimPrefix(string(buffer[:size]), marker))
			}
		}
		return netip.Addr{}, fmt.Errorf("no answer from %s: %w", to, err)
	})
}

// reach fails the test unless node n reaches the other's own addresses in both families, and is seen there by its own.
func (n *node) reach(t *testing.T, other *node, marker string) {
	t.Helper()
	to4, to6 := other.addresses()
	from4, from6 := n.addresses()
	for to, from := range map[netip.Addr]netip.Addr{to4: from4, to6: from6} {
		seen, err := n.ask(to, marker, 20)
		if err != nil {
			t.Fatalf("%s to %s: %v", n.name(), other.name(), err)
		}
		if seen != from {
			t.Errorf("%s asked from %s, want %s", n.name(), seen, from)
		}
	}
}

// miss fails the test when the other's own addresses answer.
func (n *node) miss(t *testing.T, other *node, marker string) {
	t.Helper()
	to4, to6 := other.addresses()
	for _, to := range []netip.Addr{to4, to6} {
		if seen, err := n.ask(to, marker, 2); err == nil {
			t.Errorf("%s reached %s as %s", n.name(), to, seen)
		}
	}
}

// transfer sends bytes by TCP and fails the test unless they arrive whole.
func (n *node) transfer(t *testing.T, to netip.Addr, payload []byte) {
	t.Helper()
	sum := in(t, n.host, func() ([]byte, error) {
		c, err := net.DialTCP("tcp", nil, net.TCPAddrFromAddrPort(netip.AddrPortFrom(to, 7)))
		if err != nil {
			return nil, err
		}
		defer func() { _ = c.Close() }()
		err = c.SetDeadline(time.Now().Add(time.Minute)) //nolint:forbidigo // a socket's deadline
		_, errWrite := c.Write(payload)
		err = errors.Join(err, errWrite, c.CloseWrite())
		sum, errRead := io.ReadAll(c)
		return sum, errors.Join(err, errRead)
	})
	if want := sha256.Sum256(payload); string(sum) != string(want[:]) {
		t.Errorf("%d bytes to %s did not arrive as they were sent", len(payload), to)
	}
}

// socketExists says whether the tunnel's socket is there.
func (n *node) socketExists(t *testing.T) bool {
	t.Helper()
	return in(t, n.host, func() (bool, error) {
		found, err := filepath.Glob("/var/run/wireguard/*.sock")
		return len(found) > 0, err
	})
}
