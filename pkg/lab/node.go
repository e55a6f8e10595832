package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cniconf"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// startPatience is how long a daemon may take until it can serve pods, on an emulated processor, too.
const startPatience = 2 * time.Minute

// Node is a network namespace with an uplink on the wire and directories of its own.
type Node struct {
	// Name is the name of the Node object.
	Name string
	// PodCIDRs and Addresses are those of the Node object, IPv4 first.
	PodCIDRs  []netip.Prefix
	Addresses []netip.Addr
	// MAC is that of the node's uplink.
	MAC net.HardwareAddr

	lab       *Lab
	number    byte
	namespace string
	netns     ns.NetNS
	dir       string
	processes []*Process
}

// addNode makes a node and its Node object.
func (l *Lab) addNode(ctx context.Context, number byte) (*Node, error) {
	n := &Node{
		Name:      fmt.Sprintf("node-%d", number),
		Addresses: []netip.Addr{host(nodeNetwork4, number).Addr(), host(nodeNetwork6, number).Addr()},
		PodCIDRs:  []netip.Prefix{netip.MustParsePrefix(fmt.Sprintf("10.244.%d.0/24", number))},
		MAC:       net.HardwareAddr{2, 0, 0, 0, 0, number},
		lab:       l,
		number:    number,
		namespace: fmt.Sprintf("%s-%d", l.options.Name, number),
	}
	if l.options.IPv6Nodes {
		n.Addresses = n.Addresses[1:]
	}
	if !l.options.IPv4Only {
		n.PodCIDRs = append(n.PodCIDRs, netip.MustParsePrefix(fmt.Sprintf("fd00:10:244:%d::/64", number)))
	}
	n.dir = filepath.Join(l.options.Dir, n.Name)
	for _, dir := range []string{"wireguard", "cni-conf"} {
		if err := os.MkdirAll(filepath.Join(n.dir, dir), 0o755); err != nil { //nolint:gosec // as on a real node
			return nil, fmt.Errorf("making a directory of the node: %w", err)
		}
	}
	if err := n.boot(ctx); err != nil {
		return nil, err
	}
	return n, l.Write(n.Name, n.object())
}

// boot makes the node's network namespace and its uplink.
func (n *Node) boot(ctx context.Context) error {
	l := n.lab
	var err error
	if n.netns, err = addNamespace(ctx, n.namespace); err != nil {
		return err
	}
	err = batch(ctx, n.namespace, fmt.Sprintf(`link set lo up
link add eth0 mtu %[8]d address %[9]s type veth peer name %[1]s mtu %[8]d netns %[2]s
link set eth0 addrgenmode none
link set eth0 up
addr add %[3]s dev eth0
addr add %[4]s dev eth0 nodad
addr add fe80::%[7]d/64 dev eth0 nodad
route add default via %[5]s
route add default via %[6]s`, n.Name, l.wireName(), host(nodeNetwork4, n.number), host(nodeNetwork6, n.number),
		host(nodeNetwork4, gatewayHost).Addr(), host(nodeNetwork6, gatewayHost).Addr(), n.number, l.uplinkMTU(n.number), n.MAC))
	if err == nil {
		err = batch(ctx, l.wireName(), "link set "+n.Name+" addrgenmode none\nlink set "+n.Name+" master wire up")
	}
	if err != nil {
		return errors.Join(err, n.netns.Close())
	}
	return nil
}

// Reboot does what a power cut does: the node's processes end, and its network and those of its pods are gone with all that was on
// a tmpfs. What is on the disk stays, and the runtime still knows the pods: Delete is what it does next, or nothing.
func (n *Node) Reboot(ctx context.Context, pods ...*Pod) error {
	var errs []error
	for _, p := range n.processes {
		if p.ended() == nil {
			errs = append(errs, p.Kill())
		}
	}
	n.processes = nil
	for _, pod := range pods {
		errs = append(errs, pod.lose(ctx))
	}
	errs = append(errs, n.netns.Close(), deleteNamespace(ctx, n.namespace))
	for _, dir := range []string{"run", "wireguard"} {
		errs = append(errs, os.RemoveAll(filepath.Join(n.dir, dir)))
	}
	// The kernel takes the namespace apart a little later, and the other end of the uplink goes with it.
	errs = append(errs, Until(ctx, func() error {
		links, err := execute(ctx, "", "ip", "-netns", n.lab.wireName(), "-brief", "link", "show")
		if err == nil && strings.Contains(links, n.Name+"@") {
			err = fmt.Errorf("the uplink of %s is still there", n.Name)
		}
		return err
	}), os.MkdirAll(filepath.Join(n.dir, "wireguard"), 0o755), n.boot(ctx)) //nolint:gosec // as on a real node
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("rebooting %s: %w", n.Name, err)
	}
	return nil
}

// object is the Node object.
func (n *Node) object() *corev1.Node {
	node := &corev1.Node{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Node"},
		ObjectMeta: metav1.ObjectMeta{Name: n.Name},
	}
	for _, prefix := range n.PodCIDRs {
		node.Spec.PodCIDRs = append(node.Spec.PodCIDRs, prefix.String())
	}
	node.Spec.PodCIDR = node.Spec.PodCIDRs[0]
	for _, address := range n.Addresses {
		node.Status.Addresses = append(node.Status.Addresses, corev1.NodeAddress{Type: corev1.NodeInternalIP, Address: address.String()})
	}
	return node
}

// Do runs a function in the node's network namespace.
func (n *Node) Do(do func() error) error {
	return n.netns.Do(func(ns.NetNS) error { return do() })
}

// Netns is the node's network namespace.
func (n *Node) Netns() ns.NetNS { return n.netns }

// StartTunnel starts `warrend tunnel`: WireGuard in user space where the kernel has none. Where the lab's WireGuard is the
// kernel's it idles, as on a real node.
func (n *Node) StartTunnel(ctx context.Context) (*Process, error) {
	args := []string{n.lab.options.Warrend, "tunnel"}
	if n.lab.options.WireGuard == string(wgdevice.ModeUserspace) {
		args = append(args, "--wireguard", n.lab.options.WireGuard)
	}
	return n.Start(ctx, "tunnel", nil, args)
}

// StartDaemon starts `warrend run` with further flags, and env beside the environment. It does not wait; see Ready.
func (n *Node) StartDaemon(ctx context.Context, env []string, flags ...string) (*Process, error) {
	args := []string{n.lab.options.Warrend, "run", "--node-name", n.Name, "--objects", n.lab.Objects, "--metrics-address", ""}
	for _, prefix := range n.lab.ClusterCIDRs() {
		if n.lab.options.KnownNodesOnly {
			break
		}
		args = append(args, "--cluster-cidr", prefix.String())
	}
	if n.lab.options.WireGuard != "" {
		args = append(args, "--wireguard", n.lab.options.WireGuard)
	}
	return n.Start(ctx, "warrend", env, append(append(args, n.paths()...), flags...))
}

// Command runs a command of warrend's with the node's paths, and returns what it wrote to stdout.
func (n *Node) Command(ctx context.Context, command string, flags ...string) (string, error) {
	return n.Run(ctx, append(append([]string{n.lab.options.Warrend, command}, n.paths()...), flags...)...)
}

// paths are the flags of the node's directories.
func (n *Node) paths() []string {
	return []string{
		"--run-dir", filepath.Join(n.dir, "run"), "--state-dir", n.StateDir(),
		"--cni-conf-dir", filepath.Join(n.dir, "cni-conf"), "--cni-bin-dir", filepath.Join(n.dir, "cni-bin"),
	}
}

// StateDir holds the node's key.
func (n *Node) StateDir() string { return filepath.Join(n.dir, "state") }

// Conflist is the file that the daemon writes once pods can be made.
func (n *Node) Conflist() string { return filepath.Join(n.dir, "cni-conf", cniconf.FileName) }

// Leases is the directory of the address leases.
func (n *Node) Leases() string { return filepath.Join(n.dir, "run", "ipam") }

// errRemembered says that connections of released addresses were not ended yet.
var errRemembered = errors.New("connections of addresses that were released were not ended yet")

// EndCoolDown lets the addresses that cool down be leased at once, as if their time were over. It waits until their connections have been
// ended, which nothing may shorten.
func (n *Node) EndCoolDown(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	leases, err := ipam.Open(n.Leases())
	if err == nil {
		err = Until(ctx, func() error { return leases.Forget(func([]netip.Addr) error { return errRemembered }) })
	}
	if err != nil {
		return fmt.Errorf("ending the cool-down on %s: %w", n.Name, err)
	}
	cooling, err := filepath.Glob(filepath.Join(n.Leases(), ".cooling", "*"))
	for _, name := range cooling {
		err = errors.Join(err, os.Remove(name))
	}
	if err != nil {
		return fmt.Errorf("ending the cool-down on %s: %w", n.Name, err)
	}
	return nil
}

// Status asks the daemon for its status.
func (n *Node) Status(ctx context.Context) (agentapi.Status, error) {
	return agentapi.AskStatus(ctx, filepath.Join(n.dir, "run", "warrend.sock"))
}

// Ready waits until the daemon can serve pods and knows that many peers. It fails at once when the process ends.
func (n *Node) Ready(ctx context.Context, daemon *Process, peers int) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	// A daemon that has ended will not become ready.
	ctx, giveUp := context.WithCancelCause(ctx)
	defer giveUp(nil)
	return Until(ctx, func() error {
		if err := daemon.ended(); err != nil {
			giveUp(err)
		}
		status, err := n.Status(ctx)
		switch {
		case err != nil:
			return err
		case !status.Ready || len(status.Peers) != peers:
			return fmt.Errorf("%s is not ready (%d of %d peers), problems: %v", n.Name, len(status.Peers), peers, status.Problems)
		default:
			return nil
		}
	})
}

// Leftovers lists what of Warren's is in the node's kernel and directories: rules, sets, links, routes, the conflist,
// leases, the key. It is empty on a node that never had Warren, and must be after `warrend cleanup`.
func (n *Node) Leftovers(ctx context.Context) ([]string, error) {
	var found []string
	for _, look := range []struct{ what, mark, command string }{
		{"rule", "WARREN", "iptables-save; ip6tables-save"},
		{"set", "WARREN", "ipset list -name"},
		{"link", "", "ip -oneline link show | grep -E ': (warren0|wrn[^:]*|bwp[^:]*)[:@]' || true"},
		{"route", "", "ip route show table all proto 87; ip -6 route show table all proto 87"},
		{"file", "", "find " + n.dir + " -type f -not -name '*.log' -not -path '*/cni-cache/*'"},
	} {
		out, err := n.Run(ctx, "sh", "-c", look.command)
		if err != nil {
			return nil, fmt.Errorf("looking for every %s of Warren's: %w", look.what, err)
		}
		for line := range strings.Lines(out) {
			if strings.Contains(line, look.mark) {
				found = append(found, look.what+" "+strings.TrimSpace(line))
			}
		}
	}
	return found, nil
}

// close ends the node's processes.
func (n *Node) close() error {
	var errs []error
	for _, p := range n.processes {
		if p.ended() == nil {
			_ = p.Stop() // how it ends does not matter any more
		}
	}
	errs = append(errs, n.netns.Close())
	return errors.Join(errs...)
}
