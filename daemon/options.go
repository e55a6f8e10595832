package main

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// paths are the places on the node that several commands share.
type paths struct {
	cniConfDir string
	cniBinDir  string
	runDir     string
	stateDir   string
}

// add declares the flags.
func (p *paths) add(f *pflag.FlagSet) {
	f.StringVar(&p.cniConfDir, "cni-conf-dir", "/etc/cni/net.d", "directory that the container runtime reads the CNI configuration from")
	f.StringVar(&p.cniBinDir, "cni-bin-dir", "/opt/cni/bin", "directory of the CNI plugin binaries")
	f.StringVar(&p.runDir, "run-dir", "/run/warren", "runtime state (socket, leases); must not outlive a boot")
	f.StringVar(&p.stateDir, "state-dir", "/var/lib/warren", "lasting state (the node's WireGuard key)")
}

// socket is where the daemon answers.
func (p *paths) socket() string { return filepath.Join(p.runDir, "warrend.sock") }

// leases is the directory of the address leases.
func (p *paths) leases() string { return filepath.Join(p.runDir, "ipam") }

// planning are the flags that decide what is planned, for `run` and `render`.
type planning struct {
	nodeName       string
	objects        string
	clusterCIDRs   []string
	nonMasquerade  []string
	encryption     string
	port           uint16
	mtu            int
	parsedCluster  []netip.Prefix
	parsedNonMasq  []netip.Prefix
	encryptionMode bool
	logConnections string
	logMode        cluster.LogMode
	serviceCIDRs   []string
	nodeCIDRs      []string
	nodeTraffic    bool
	parsedService  []netip.Prefix
	parsedNode     []netip.Prefix
}

// add declares the flags.
func (p *planning) add(f *pflag.FlagSet) {
	f.StringVar(&p.objects, "objects", "", "read Node, Namespace, Pod, Service and NetworkPolicy YAML from this directory instead of an API server")
	f.StringSliceVar(&p.clusterCIDRs, "cluster-cidr", nil, "the pods' network, one prefix per family (kubeadm: --pod-network-cidr); without it the plaintext guard covers only podCIDRs that are already known")
	f.StringSliceVar(&p.nonMasquerade, "non-masquerade-cidr", nil, "destinations outside the cluster that see the pod's own address instead of the node's")
	f.StringVar(&p.encryption, "encryption", "on", "on: pod traffic between nodes goes through WireGuard or is dropped; off: it goes in clear")
	f.StringVar(&p.logConnections, "log-connections", "none", "connections of isolated pods to log where neither policy nor Namespace says so (annotation warren.cni/log): none, denied or all")
	f.StringSliceVar(&p.serviceCIDRs, "service-cidr", nil, "the Services' network (kubeadm: --service-cidr); a node that claims an address in it as its endpoint is refused, and pods send nothing there that kube-proxy has not translated")
	f.StringSliceVar(&p.nodeCIDRs, "node-cidr", nil, "the nodes' network, for --encrypt-node-traffic")
	f.BoolVar(&p.nodeTraffic, "encrypt-node-traffic", false, "send what pods send to other nodes' InternalIPs inside --node-cidr through the tunnel, too")
	f.Uint16Var(&p.port, "wireguard-port", 51820, "UDP port of the WireGuard tunnel")
	f.IntVar(&p.mtu, "mtu", 0, "MTU of the pods and the tunnel (0: from the uplink)")
}

// validate parses what pflag leaves as text.
func (p *planning) validate() error {
	var errs [6]error
	p.parsedCluster, errs[0] = parsePrefixes("cluster-cidr", p.clusterCIDRs)
	p.parsedNonMasq, errs[1] = parsePrefixes("non-masquerade-cidr", p.nonMasquerade)
	switch p.encryption {
	case "on":
		p.encryptionMode = true
	case "off":
	default:
		errs[2] = fmt.Errorf("--encryption=%s: say on or off", p.encryption)
	}
	p.parsedService, errs[4] = parsePrefixes("service-cidr", p.serviceCIDRs)
	p.parsedNode, errs[5] = parsePrefixes("node-cidr", p.nodeCIDRs)
	p.logMode, errs[3] = cluster.ParseLogMode(p.logConnections)
	if errs[3] != nil {
		errs[3] = fmt.Errorf("--log-connections=%w", errs[3])
	}
	if err := errors.Join(errs[:]...); err != nil {
		return err
	}
	if p.mtu != 0 && (p.mtu < 1280 || p.mtu > 65535) {
		return fmt.Errorf("--mtu=%d: say 0 (from the uplink) or 1280 (the least that IPv6 allows) to 65535", p.mtu)
	}
	if p.nodeTraffic && (len(p.parsedNode) == 0 || !p.encryptionMode) {
		return errors.New("--encrypt-node-traffic: needs --node-cidr, the network that holds the nodes' InternalIPs, and --encryption on")
	}
	if p.port == 0 {
		return errors.New("--wireguard-port=0: say the UDP port that the nodes' firewalls let pass")
	}
	return nil
}

// tunnelledNodes are the networks of the nodes that pods reach through the tunnel; there are none unless a flag says so.
func (p *planning) tunnelledNodes() []netip.Prefix {
	if !p.nodeTraffic {
		return nil
	}
	return p.parsedNode
}

// guards are the guards that go with a mesh; their start gate lets nobody pass.
func (p *planning) guards(m mesh.Config) guard.Config {
	return guard.Config{
		PodCIDRs:      m.PodCIDRs,
		Addresses:     m.Addresses,
		KnownPodCIDRs: m.KnownPodCIDRs,
		ClusterCIDRs:  p.parsedCluster,
		NonMasquerade: p.parsedNonMasq,
		Services:      p.parsedService,
		Encrypted:     p.encryptionMode,
	}
}

// parsePrefixes parses the values of a flag.
func parsePrefixes(flag string, values []string) ([]netip.Prefix, error) {
	var prefixes []netip.Prefix
	for _, value := range values {
		prefix, err := netip.ParsePrefix(strings.TrimSpace(value))
		if err != nil {
			return nil, fmt.Errorf("--%s=%s: say a prefix such as 10.244.0.0/16: %w", flag, value, err)
		}
		if prefix.Addr().Is4In6() {
			return nil, fmt.Errorf("--%s=%s: say an IPv4 prefix such as 10.244.0.0/16, not one inside IPv6", flag, value)
		}
		prefixes = append(prefixes, prefix.Masked())
	}
	return prefixes, nil
}

// runOptions are all flags of `warrend run`.
type runOptions struct {
	paths
	planning
	tunnelChoice

	kubeconfig     string
	metricsAddress string
	sysctlDir      string
	rotation       rotation
	logging        logOptions
}

// add declares the flags.
func (o *runOptions) add(f *pflag.FlagSet) {
	o.paths.add(f)
	o.planning.add(f)
	o.tunnelChoice.add(f)
	o.logging.add(f)
	o.rotation.add(f)
	f.StringVar(&o.nodeName, "node-name", "", "name of this node's Node object (required)")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "kubeconfig file (default: the pod's ServiceAccount)")
	f.StringVar(&o.sysctlDir, "sysctl-dir", "/proc/sys", "where the kernel's settings can be written (a container sees /proc/sys read-only)")
	f.StringVar(&o.metricsAddress, "metrics-address", "127.0.0.1:9476", "address of /metrics, /healthz and /readyz; empty: none")
}

// validate checks the flags together and names the one to change.
func (o *runOptions) validate() (wgdevice.Mode, error) {
	if o.nodeName == "" {
		return "", errors.New("--node-name is missing: say the name of this node's Node object (kubectl get nodes)")
	}
	if o.objects != "" && o.kubeconfig != "" {
		return "", errors.New("--objects and --kubeconfig exclude each other: read either a directory or an API server")
	}
	if err := errors.Join(o.planning.validate(), o.rotation.validate()); err != nil {
		return "", err
	}
	return o.mode()
}

// tunnelChoice says whose WireGuard the node uses.
type tunnelChoice struct{ wireguard string }

// add declares the flag.
func (c *tunnelChoice) add(f *pflag.FlagSet) {
	f.StringVar(&c.wireguard, "wireguard", "auto", "kernel, userspace, or auto: the kernel's where it has one")
}

// mode parses the flag.
func (c *tunnelChoice) mode() (wgdevice.Mode, error) {
	switch mode := wgdevice.Mode(c.wireguard); mode {
	case wgdevice.ModeAuto, wgdevice.ModeKernel, wgdevice.ModeUserspace:
		return mode, nil
	default:
		return "", fmt.Errorf("--wireguard=%s: say auto, kernel or userspace", c.wireguard)
	}
}

// logOptions choose the log's form.
type logOptions struct {
	level  string
	format string
}

// add declares the flags.
func (o *logOptions) add(f *pflag.FlagSet) {
	f.StringVar(&o.level, "log-level", "info", "debug, info, warn or error")
	f.StringVar(&o.format, "log-format", "text", "text or json")
}

// logger returns the logger that the flags ask for.
func (o *logOptions) logger(w io.Writer) (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(o.level)); err != nil {
		return nil, fmt.Errorf("--log-level=%s: say debug, info, warn or error", o.level)
	}
	options := &slog.HandlerOptions{Level: level}
	switch o.format {
	case "text":
		return slog.New(slog.NewTextHandler(w, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(w, options)), nil
	default:
		return nil, fmt.Errorf("--log-format=%s: say text or json", o.format)
	}
}

// runCommand is the daemon.
func runCommand() *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run the node daemon",
		Long: `Run the node daemon: enforce NetworkPolicies, keep the WireGuard mesh, and answer the CNI plugin.

It leaves everything in the kernel working when it ends; "warrend cleanup" removes it.
Each flag is also an environment variable: --node-name is WARREN_NODE_NAME.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			mode, err := o.validate()
			if err != nil {
				return err
			}
			log, err := o.logging.logger(os.Stderr)
			if err != nil {
				return err
			}
			return run(cmd.Context(), o, mode, log)
		},
	}
	o.add(cmd.Flags())
	return cmd
}
