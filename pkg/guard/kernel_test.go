package guard_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
	"github.com/warren-cni/warren/pkg/testnode"
)

// network is a node with an uplink, a stand-in for the tunnel, and a pod; lan and remote are at their other ends. The
// remote end has the addresses of a remote pod, the lan end those of a host on the LAN.
type network struct {
	t                      *testing.T
	node, lan, remote, pod ns.NetNS
}

// Addresses in the network, IPv4 and IPv6.
var (
	nodeUplink = map[netfilter.Family]string{netfilter.IPv4: "192.168.0.1", netfilter.IPv6: "fc00::1"}
	lanHost    = map[netfilter.Family]string{netfilter.IPv4: "192.168.0.9", netfilter.IPv6: "fc00::9"}
	nodeOwn    = map[netfilter.Family]string{netfilter.IPv4: "10.244.1.1", netfilter.IPv6: "fd00:10:244:1::1"}
	localPod   = map[netfilter.Family]string{netfilter.IPv4: "10.244.1.7", netfilter.IPv6: "fd00:10:244:1::7"}
	// foreign is an address that the pod gives to itself.
	foreign   = map[netfilter.Family]string{netfilter.IPv4: "192.0.2.66", netfilter.IPv6: "2001:db8::66"}
	remotePod = map[netfilter.Family]string{netfilter.IPv4: "10.244.2.9", netfilter.IPv6: "fd00:10:244:2::9"}
)

const (
	port = "7777"
	// service is a port of the node that is translated to the remote pod's.
	service = "30777"
	// lost is how long a packet may take in these namespaces before it counts as dropped.
	lost = 300 * time.Millisecond
)

func newNetwork(t *testing.T) *network {
	t.Helper()
	n := &network{t: t, node: testnode.Enter(t), lan: testnode.New(t), remote: testnode.New(t), pod: testnode.New(t)}
	n.link("eth0", n.lan)
	n.link("warren0", n.remote)
	n.link("wrn1", n.pod)
	for f, length := range map[netfilter.Family]string{netfilter.IPv4: "/32", netfilter.IPv6: "/128"} {
		subnet := map[netfilter.Family]string{netfilter.IPv4: "/24", netfilter.IPv6: "/64"}[f]
		n.ip(n.node, "addr add "+nodeUplink[f]+subnet+" dev eth0"+nodad(f))
		n.ip(n.node, "addr add "+nodeOwn[f]+length+" dev warren0"+nodad(f))
		n.ip(n.node, "route add "+remotePod[f]+length+" dev warren0 src "+nodeOwn[f])
		n.ip(n.node, "route add "+localPod[f]+length+" dev wrn1")
		n.ip(n.lan, "addr add "+lanHost[f]+subnet+" dev p"+nodad(f))
		n.ip(n.remote, "addr add "+remotePod[f]+length+" dev p"+nodad(f))
		n.ip(n.pod, "addr add "+localPod[f]+length+" dev p"+nodad(f))
		// Nothing here is about neighbours: the other end of each link is known.
		gateway := map[netfilter.Family]string{netfilter.IPv4: "169.254.1.1", netfilter.IPv6: "fe80::1"}[f]
		for _, far := range []ns.NetNS{n.lan, n.remote, n.pod} {
			n.ip(far, "neigh add "+gateway+" lladdr 02:00:00:00:00:01 dev p nud permanent")
			n.ip(far, "route add default via "+gateway+" dev p onlink")
		}
		for near, far := range map[string]string{"eth0": lanHost[f], "warren0": remotePod[f], "wrn1": localPod[f]} {
			n.ip(n.node, "neigh add "+far+" lladdr 02:00:00:00:00:02 dev "+near+" nud permanent")
		}
	}
	return n
}

func nodad(f netfilter.Family) string {
	if f == netfilter.IPv6 {
		return " nodad"
	}
	return ""
}

// link joins the node to a namespace, where the far end is called p.
func (n *network) link(name string, far ns.NetNS) {
	n.t.Helper()
	n.ip(n.node, "link add "+name+" address 02:00:00:00:00:01 type veth peer name p address 02:00:00:00:00:02 netns "+filepath.Base(far.Path()))
	n.ip(n.node, "link set "+name+" up")
	n.ip(far, "link set p up")
}

func (n *network) ip(space ns.NetNS, words string) {
	n.t.Helper()
	n.run(space, "", append([]string{"ip"}, strings.Fields(words)...)...)
}

// run runs a command in a namespace.
func (n *network) run(space ns.NetNS, input string, words ...string) {
	n.t.Helper()
	err := space.Do(func(ns.NetNS) error {
		cmd := exec.CommandContext(n.t.Context(), words[0], words[1:]...)
		cmd.Stdin = strings.NewReader(input)
		out, err := cmd.CombinedOutput()
		if err != nil || len(out) > 0 {
			return errors.Join(err, errors.New(string(out)))
		}
		return nil
	})
	if err != nil {
		n.t.Fatalf("running %q: %v", words, err)
	}
}

// load puts the rules of a configuration onto the node, which drops what nobody accepts.
func (n *network) load(config guard.Config) {
	n.t.Helper()
	none, _ := policy.Compile(cluster.Snapshot{})
	rules := netfilter.Merge(guard.Compile(config), none)
	for _, f := range netfilter.Families {
		tool := map[netfilter.Family]string{netfilter.IPv4: "iptables", netfilter.IPv6: "ip6tables"}[f]
		for _, table := range []string{"filter", "mangle", "nat", "raw"} {
			n.run(n.node, "", tool, "-t", table, "-F")
		}
		n.run(n.node, "", tool, "-P", "FORWARD", "DROP")
		n.run(n.node, "", tool, "-t", "nat", "-A", "PREROUTING", "-i", "eth0", "-p", "udp", "--dport", service,
			"-j", "DNAT", "--to-destination", netip.AddrPortFrom(netip.MustParseAddr(remotePod[f]), 7777).String())
		var sets, tables strings.Builder
		for line := range strings.Lines(rules.Of(f).Render(f)) {
			switch word, rest, _ := strings.Cut(strings.TrimSpace(line), " "); word {
			case "create", "add":
				sets.WriteString(line)
			case "hook":
				defer n.run(n.node, "", append([]string{tool}, strings.Fields(rest)...)...) // when its chain is there
			default:
				tables.WriteString(line)
			}
		}
		n.run(n.node, sets.String(), "ipset", "restore", "-exist")
		n.run(n.node, tables.String(), tool+"-restore", "--noflush")
	}
}

// probe sends a packet and returns the source that it arrives with, or "" where it does not within the time.
func (n *network) probe(from ns.NetNS, source, destination, destinationPort string, to ns.NetNS) string {
	n.t.Helper()
	var listener, sender net.PacketConn
	err := errors.Join(
		to.Do(func(ns.NetNS) (err error) {
			listener, err = (&net.ListenConfig{}).ListenPacket(n.t.Context(), "udp", ":"+port)
			return err
		}),
		from.Do(func(ns.NetNS) (err error) {
			sender, err = (&net.ListenConfig{}).ListenPacket(n.t.Context(), "udp", net.JoinHostPort(source, "0"))
			return err
		}))
	if err != nil {
		n.t.Fatal(err)
	}
	defer func() { n.check(errors.Join(listener.Close(), sender.Close())) }()
	target, err := net.ResolveUDPAddr("udp", net.JoinHostPort(destination, destinationPort))
	n.check(err)
	_, err = sender.WriteTo([]byte("probe"), target)
	if errors.Is(err, os.ErrPermission) {
		return "" // dropped on the way out of the node that sends it
	}
	n.check(err)
	wait, cancel := context.WithTimeout(n.t.Context(), lost)
	defer cancel()
	deadline, _ := wait.Deadline()
	n.check(listener.SetReadDeadline(deadline))
	_, seen, err := listener.ReadFrom(make([]byte, 100))
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ""
	}
	n.check(err)
	return netip.MustParseAddrPort(seen.String()).Addr().Unmap().String()
}

func (n *network) check(err error) {
	n.t.Helper()
	if err != nil {
		n.t.Fatal(err)
	}
}

// expect checks a probe to the usual port.
func (n *network) expect(name, got, want string) {
	n.t.Helper()
	if got != want {
		n.t.Errorf("%s: arrives from %q, want %q", name, got, want)
	}
}

func TestPackets(t *testing.T) {
	n := newNetwork(t)
	on := dual()
	off := changed(func(c *guard.Config) { c.Encrypted = false })
	n.load(on)
	for _, f := range netfilter.Families {
		t.Log(f)
		n.expect("pod to a remote pod", n.probe(n.pod, localPod[f], remotePod[f], port, n.remote), localPod[f])
		n.expect("remote pod to a pod", n.probe(n.remote, remotePod[f], localPod[f], port, n.pod), remotePod[f])
		n.expect("pod to the world", n.probe(n.pod, localPod[f], lanHost[f], port, n.lan), nodeUplink[f])
		n.expect("pod to its node", n.probe(n.pod, localPod[f], nodeUplink[f], port, n.node), localPod[f])
		n.expect("the node to its pod", n.probe(n.node, nodeUplink[f], localPod[f], port, n.pod), nodeUplink[f])
		n.expect("the node to a remote pod", n.probe(n.node, nodeOwn[f], remotePod[f], port, n.remote), nodeOwn[f])
		n.expect("the node's other address to a remote pod", n.probe(n.node, nodeUplink[f], remotePod[f], port, n.remote), nodeOwn[f])
		n.expect("a client of a Service", n.probe(n.lan, lanHost[f], nodeUplink[f], service, n.remote), nodeOwn[f])
		n.expect("another host that routes through the node", n.probe(n.lan, lanHost[f], remotePod[f], port, n.remote), "")

		// The tunnel's route goes, and the host behind the uplink takes the remote pod's address, as a hostile one would; the
		// pod takes another one.
		length := map[netfilter.Family]string{netfilter.IPv4: "/32", netfilter.IPv6: "/128"}[f]
		n.ip(n.node, "route del "+remotePod[f]+length+" dev warren0")
		n.ip(n.node, "route add "+remotePod[f]+length+" dev eth0")
		n.ip(n.node, "neigh add "+remotePod[f]+" lladdr 02:00:00:00:00:02 dev eth0 nud permanent")
		n.ip(n.lan, "addr add "+remotePod[f]+length+" dev p"+nodad(f))
		n.ip(n.pod, "addr add "+foreign[f]+length+" dev p"+nodad(f))
		n.expect("pod to a remote pod without the tunnel", n.probe(n.pod, localPod[f], remotePod[f], port, n.lan), "")
		n.expect("the node to a remote pod without the tunnel", n.probe(n.node, nodeUplink[f], remotePod[f], port, n.lan), "")
		n.expect("another host as a remote pod", n.probe(n.lan, remotePod[f], localPod[f], port, n.pod), "")
		n.expect("pod from a foreign address", n.probe(n.pod, foreign[f], lanHost[f], port, n.lan), "")
	}
	// With encryption off the same packets pass, so what was lost above was dropped by the guard.
	n.load(off)
	for _, f := range netfilter.Families {
		t.Log(f, "encryption off")
		n.expect("pod to a remote pod by the uplink", n.probe(n.pod, localPod[f], remotePod[f], port, n.lan), localPod[f])
		n.expect("the node to a remote pod by the uplink", n.probe(n.node, nodeUplink[f], remotePod[f], port, n.lan), nodeUplink[f])
		n.expect("remote pod by the uplink", n.probe(n.lan, remotePod[f], localPod[f], port, n.pod), remotePod[f])
	}
	// Without a place in the ready set the pod is alone.
	n.run(n.node, "", "ipset", "flush", netfilter.ReadySet(netfilter.IPv4))
	n.run(n.node, "", "ipset", "flush", netfilter.ReadySet(netfilter.IPv6))
	for _, f := range netfilter.Families {
		t.Log(f, "gate closed")
		n.expect("a pod that is not ready", n.probe(n.pod, localPod[f], lanHost[f], port, n.lan), "")
		n.expect("to a pod that is not ready", n.probe(n.lan, remotePod[f], localPod[f], port, n.pod), "")
		n.expect("the node to a pod that is not ready", n.probe(n.node, nodeUplink[f], localPod[f], port, n.pod), nodeUplink[f])
	}
	// And without any rules a pod can be whom it likes.
	for _, f := range netfilter.Families {
		tool := map[netfilter.Family]string{netfilter.IPv4: "iptables", netfilter.IPv6: "ip6tables"}[f]
		n.run(n.node, "", tool, "-t", "raw", "-F")
		n.run(n.node, "", tool, "-t", "mangle", "-F")
		n.run(n.node, "", tool, "-F", "WARREN-BELT")
		n.expect("pod from a foreign address, no rules", n.probe(n.pod, foreign[f], lanHost[f], port, n.lan), foreign[f])
	}
}

// What a pod sends to a node through the tunnel has the pod's address. When the way through the tunnel goes, it does not leave by the
// uplink with that, where it never was translated.
func TestBegunInTheTunnel(t *testing.T) {
	n := newNetwork(t)
	n.load(dual())
	for _, f := range netfilter.Families {
		t.Log(f)
		length := map[netfilter.Family]string{netfilter.IPv4: "/32", netfilter.IPv6: "/128"}[f]
		n.ip(n.remote, "addr add "+lanHost[f]+length+" dev p"+nodad(f))
		n.ip(n.node, "neigh add "+lanHost[f]+" lladdr 02:00:00:00:00:02 dev warren0 nud permanent")
		n.ip(n.node, "route add "+lanHost[f]+length+" dev warren0")
		k := n.talk(n.pod, localPod[f], lanHost[f], n.remote, lanHost[f])
		n.expect("through the tunnel", k.patiently(), "answered")
		k.move(n.lan, lanHost[f])
		n.ip(n.node, "route del "+lanHost[f]+length+" dev warren0")
		n.expect("begun in the tunnel, by the uplink", k.says(), "")
		n.load(changed(func(c *guard.Config) { c.Encrypted = false }))
		n.expect("begun in the tunnel, encryption off", k.patiently(), "answered")
		k.end()
		n.load(dual())
	}
}

// What the ends of a TCP connection through the tunnel offer each other fits the tunnel, whichever end begins, though the links of both
// hold more.
func TestSegmentsFitTheTunnel(t *testing.T) {
	const tunnelMTU, tcpHeader = 1280, 20 + 12 // with timestamps
	n := newNetwork(t)
	n.ip(n.node, fmt.Sprintf("link set warren0 mtu %d", tunnelMTU))
	for _, clamped := range []bool{true, false} {
		n.load(dual())
		if !clamped { // the control
			n.run(n.node, "", "iptables", "-t", "mangle", "-F", "WARREN-SEGMENTS")
			n.run(n.node, "", "ip6tables", "-t", "mangle", "-F", "WARREN-SEGMENTS")
		}
		for _, f := range netfilter.Families {
			fits := tunnelMTU - tcpHeader - map[netfilter.Family]int{netfilter.IPv4: 20, netfilter.IPv6: 40}[f]
			for name, ends := range map[string][2]uint32{
				"a pod to a remote pod": n.segments(n.pod, n.remote, remotePod[f]),
				"a remote pod to a pod": n.segments(n.remote, n.pod, localPod[f]),
			} {
				for i, size := range ends {
					if (int(size) <= fits) != clamped {
						t.Errorf("%s, %s, clamped %v: end %d sends segments of %d bytes, of which %d fit", f, name, clamped, i, size, fits)
					}
				}
			}
		}
	}
}

// segments opens a TCP connection and returns what its ends, of which the first began it, put into a segment.
func (n *network) segments(from, to ns.NetNS, destination string) (sizes [2]uint32) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 10*time.Second)
	defer cancel()
	var listener net.Listener
	var ends [2]net.Conn
	n.check(to.Do(func(ns.NetNS) (err error) {
		listener, err = new(net.ListenConfig).Listen(ctx, "tcp", ":"+port)
		return err
	}))
	defer func() { n.check(listener.Close()) }()
	n.check(from.Do(func(ns.NetNS) (err error) {
		ends[0], err = new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(destination, port))
		return err
	}))
	var err error
	ends[1], err = listener.Accept()
	n.check(err)
	for i, end := range ends {
		raw, err := end.(*net.TCPConn).SyscallConn()
		n.check(err)
		var info *unix.TCPInfo
		n.check(errors.Join(raw.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO) }), err))
		sizes[i] = info.Snd_mss
		n.check(end.Close())
	}
	return sizes
}

// The kernel takes the rules also where a cluster CIDR holds all addresses.
func TestFenceOfEverything(t *testing.T) {
	n := newNetwork(t)
	n.load(changed(func(c *guard.Config) { c.ClusterCIDRs = prefixes("0.0.0.0/0", "::/0") }))
}
