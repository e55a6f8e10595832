// Package lab builds small clusters on one machine, for tests and for the demo: network namespaces as nodes on a wire of
// their own, real daemons in them, pods made through libcni by the real plugin, probes between pods, and a capture of
// the wire.
//
// It is for tests and the demo alone; it is not internal because commands outside of pkg are tested with it, too.
//
// Nothing of it touches the network namespace that it is called in: the wire is a bridge in a namespace of its own. All
// namespaces of a lab have its name as prefix, so that New can clear what a killed run left. It needs root.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/internal/wire"
)

// The networks of every lab, as functions because nothing may change them. The nodes' are documentation ranges.
const (
	podNetwork4  = "10.244.0.0/16"
	podNetwork6  = "fd00:10:244::/48"
	nodeNetwork4 = "192.0.2.0/24"
	nodeNetwork6 = "2001:db8::/64"
	// gatewayHost is the wire's own host number: the nodes' default route leads there, so that what leaves the pods'
	// network is seen on the wire and answered by nobody.
	gatewayHost = 254
)

// wireGuardPort is the default of warrend, which the labs leave.
const wireGuardPort = 51820

// ethernetMTU is that of an uplink of which nothing else is said.
const ethernetMTU = 1500

// maxNodes keeps host numbers and podCIDRs within a byte.
const maxNodes = 9

// Options say what a lab is made of.
type Options struct {
	// Name is the prefix of the lab's network namespaces, at most nine characters of a machine-wide unique name.
	Name string
	// Dir holds everything that the lab writes; it must exist.
	Dir string
	// Nodes is how many nodes there are, 1 to 9.
	Nodes int
	// Warrend is the daemon's binary.
	Warrend string
	// Plugins are the directories of the CNI plugins' binaries.
	Plugins []string
	// WireGuard says where WireGuard runs, as the daemon's flag of that name does. Empty leaves it to the daemon.
	WireGuard string
	// IPv4Only makes a cluster whose pods have IPv4 alone; the nodes still have both families.
	IPv4Only bool
	// IPv6Nodes makes Node objects that have IPv6 addresses alone, so that the tunnel's own packets are IPv6.
	IPv6Nodes bool
	// KnownNodesOnly keeps the cluster CIDR from the daemons, which then guard only the podCIDRs that they know.
	KnownNodesOnly bool
	// UplinkMTUs are the nodes' in their order; the last one is that of the nodes behind it, too, and without any all have 1500.
	UplinkMTUs []int
}

// Lab is a cluster on this machine.
type Lab struct {
	options Options
	wire    ns.NetNS
	// Nodes are node-1, node-2 and so on.
	Nodes []*Node
	// Objects is the directory that all daemons read.
	Objects string
}

// New makes the wire and the nodes, and writes the Node objects. No daemon runs yet. Close takes all of it away again.
func New(ctx context.Context, o Options) (*Lab, error) {
	if o.Nodes < 1 || o.Nodes > maxNodes {
		return nil, fmt.Errorf("making a lab of %d nodes: 1 to %d are possible", o.Nodes, maxNodes)
	}
	if err := sweep(ctx, o.Name); err != nil {
		return nil, err
	}
	l := &Lab{options: o, Objects: filepath.Join(o.Dir, "objects")}
	if err := l.build(ctx); err != nil {
		return nil, errors.Join(err, l.Close(ctx))
	}
	return l, nil
}

// build makes the wire and the nodes.
func (l *Lab) build(ctx context.Context) error {
	// The place where WireGuard's user-space sockets are looked for is fixed; each process gets its node's directory there.
	for _, dir := range []string{l.Objects, wireguardSockets} {
		if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // the objects are no secret
			return fmt.Errorf("making a directory of the lab: %w", err)
		}
	}
	var err error
	if l.wire, err = addNamespace(ctx, l.wireName()); err != nil {
		return err
	}
	err = batch(ctx, l.wireName(), `link set lo up
link add wire type bridge
link set wire addrgenmode none
link set wire up
addr add `+host(nodeNetwork4, gatewayHost).String()+` dev wire
addr add `+host(nodeNetwork6, gatewayHost).String()+` dev wire nodad`)
	if err == nil {
		err = l.wire.Do(func(ns.NetNS) error { return passFrames() })
	}
	if err != nil {
		return fmt.Errorf("making the wire: %w", err)
	}
	for number := range byte(l.options.Nodes) { //nolint:gosec // New allows a few
		node, err := l.addNode(ctx, number+1)
		if err != nil {
			return fmt.Errorf("making node %d: %w", number+1, err)
		}
		l.Nodes = append(l.Nodes, node)
	}
	return nil
}

// passFrames has the bridges of this network namespace pass frames as a switch does. Where another program wants them to obey iptables, as
// container runtimes do, the kernel divides packets that are too long for the next link.
func passFrames() error {
	for _, program := range []string{"iptables", "ip6tables"} {
		err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+program, []byte("0"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("having a bridge pass frames: %w", err)
		}
	}
	return nil
}

// Close ends every process of the lab and removes its namespaces with everything in them, also when ctx has ended. The
// files in Dir stay.
func (l *Lab) Close(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 30*time.Second)
	defer cancel()
	var errs []error
	for _, node := range l.Nodes {
		errs = append(errs, node.close())
	}
	if l.wire != nil {
		errs = append(errs, l.wire.Close())
	}
	return errors.Join(append(errs, sweep(ctx, l.options.Name))...)
}

// ClusterCIDRs are the networks of all pods.
func (l *Lab) ClusterCIDRs() []netip.Prefix {
	if l.options.IPv4Only {
		return []netip.Prefix{netip.MustParsePrefix(podNetwork4)}
	}
	return []netip.Prefix{netip.MustParsePrefix(podNetwork4), netip.MustParsePrefix(podNetwork6)}
}

// Capture counts what passes the wire until it is stopped.
type Capture = wire.Capture

// Counts is what a Capture saw.
type Counts = wire.Counts

// Capture starts to count what passes the wire.
func (l *Lab) Capture(marker [MarkerSize]byte) (*Capture, error) {
	var capture *wire.Capture
	err := l.wire.Do(func(ns.NetNS) error {
		var err error
		capture, err = wire.Start(WireLink, wire.Watch{Marker: marker[:], Pods: l.ClusterCIDRs(), Port: wireGuardPort})
		return err
	})
	return capture, err
}

// Wire is the network namespace of the wire, which is a bridge called WireLink there, with the addresses to which the nodes'
// default routes lead: a host beside the nodes that is none of them.
func (l *Lab) Wire() ns.NetNS { return l.wire }

// WireLink is the bridge in the namespace of the wire.
const WireLink = "wire"

// wireName is the network namespace of the wire.
func (l *Lab) wireName() string { return l.options.Name + "-wire" }

// uplinkMTU is the MTU of a node's uplink, by the node's number.
func (l *Lab) uplinkMTU(number byte) int {
	if len(l.options.UplinkMTUs) == 0 {
		return ethernetMTU
	}
	return l.options.UplinkMTUs[min(int(number), len(l.options.UplinkMTUs))-1]
}

// host returns the address with that number in a network, with the network's length.
func host(network string, number byte) netip.Prefix {
	prefix := netip.MustParsePrefix(network)
	bytes := prefix.Addr().AsSlice()
	bytes[len(bytes)-1] = number
	address, _ := netip.AddrFromSlice(bytes)
	return netip.PrefixFrom(address, prefix.Bits())
}

// Until tries a condition until it holds, and returns its last error when the context ends before that.
func Until(ctx context.Context, condition func() error) error {
	again := time.NewTicker(50 * time.Millisecond)
	defer again.Stop()
	for {
		err := condition()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, context.Cause(ctx))
		case <-again.C:
		}
	}
}
