package preflight

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/podlink"
)

// The links of Warren's own: the tunnel, and the prefix of pods' links.
const (
	ownTunnel = mesh.Link
	ownPods   = podlink.Prefix
)

// isOwn says whether a link is Warren's by its name.
func isOwn(link string) bool { return link == ownTunnel || strings.HasPrefix(link, ownPods) }

// families says which families pods have: those of the cluster CIDRs, IPv4 where none is known.
func families(w Wanted) (v4, v6 bool) {
	for _, p := range w.ClusterCIDRs {
		v4, v6 = v4 || p.Addr().Is4(), v6 || p.Addr().Is6()
	}
	return v4 || !v6, v6
}

// forwarding looks whether the node forwards packets, and keeps its default route while it does.
func forwarding(f Facts, w Wanted) ([]Finding, error) {
	var findings []Finding
	v4, v6 := families(w)
	off := func(setting string) {
		findings = append(findings, Finding{
			Severity: Note, Code: "ForwardingOff", Object: "sysctl " + setting,
			Message: "the node does not forward packets; warrend turns it on and keeps it on, but pods are cut off where something turns it off again",
			Remedy:  fmt.Sprintf("make it lasting: echo %s=1 >> /etc/sysctl.d/99-warren.conf, and look for another file there that says 0", setting),
		})
	}
	if f.Forwarding.Err == nil && v4 && !f.Forwarding.Value.IPv4 {
		off("net.ipv4.ip_forward")
	}
	if f.Forwarding.Err == nil && v6 && !f.Forwarding.Value.IPv6 {
		off("net.ipv6.conf.all.forwarding")
	}
	for _, a := range f.Advertised.Value {
		if a.AcceptRA != "1" {
			continue // 2 accepts them always, with 0 a program of its own takes care
		}
		setting := "net.ipv6.conf." + strings.ReplaceAll(a.Link, ".", "/") + ".accept_ra"
		found := Finding{
			Severity: Note, Code: "RouterAdvertisements", Object: "sysctl " + setting,
			Message: "the IPv6 default route came by router advertisement, and the kernel drops it once it forwards; warrend sets 2 before that",
			Remedy:  fmt.Sprintf("make it lasting: echo %s=2 >> /etc/sysctl.d/99-warren-ra.conf", setting),
		}
		if f.Forwarding.Err == nil && f.Forwarding.Value.IPv6 {
			found.Severity = Warning
			found.Message = "the IPv6 default route came by router advertisement, and the node forwards: the kernel hears no more of them, and drops the route when it expires"
		}
		findings = append(findings, found)
	}
	return findings, errors.Join(f.Forwarding.Err, f.Advertised.Err)
}

// port looks whether the tunnel can have its port.
func port(f Facts, w Wanted) ([]Finding, error) {
	if !w.Encrypted {
		return nil, nil
	}
	if f.Sockets.Err != nil || len(f.Sockets.Value) == 0 {
		return nil, f.Sockets.Err
	}
	holder := "another program"
	for _, s := range f.Sockets.Value {
		if s.Holder != "" {
			holder = s.Holder
		}
	}
	return []Finding{{
		Severity: Error, Code: "PortTaken", Object: fmt.Sprintf("UDP port %d", w.Port),
		Message: fmt.Sprintf("%s has it (%s): the tunnel cannot, and no pod starts here", holder, f.Sockets.Value[0].Address),
		Remedy:  "stop that program (ss -ulnp names it; one without a name is a WireGuard link, see wg show), or give Warren another port on all nodes: --wireguard-port",
	}}, nil
}

// uplinks returns the links by which the default routes lead out that the kernel takes: those of the smallest metric of each family.
func uplinks(f Facts) []Link {
	least := map[bool]int{}
	for _, r := range f.Routes.Value {
		if v6 := r.Destination.Addr().Is6(); r.isDefault() {
			if metric, ok := least[v6]; !ok || r.Metric < metric {
				least[v6] = r.Metric
			}
		}
	}
	var found []Link
	for _, l := range f.Links.Value {
		if slices.ContainsFunc(f.Routes.Value, func(r Route) bool {
			return r.isDefault() && r.Link == l.Name && r.Metric == least[r.Destination.Addr().Is6()]
		}) {
			found = append(found, l)
		}
	}
	return found
}

// mtu looks whether what the uplink takes is enough for pods.
func mtu(f Facts, w Wanted) ([]Finding, error) {
	if err := errors.Join(f.Links.Err, f.Routes.Err); err != nil {
		return nil, err
	}
	node := cluster.Node{Name: "this", PodCIDRs: w.ClusterCIDRs}
	options := mesh.Options{Encrypted: w.Encrypted}
	name := ""
	for _, l := range uplinks(f) {
		if options.Uplink.MTU == 0 || l.MTU < options.Uplink.MTU {
			options.Uplink.MTU, name = l.MTU, l.Name
		}
		for _, a := range l.Addresses {
			if !a.Addr().IsLinkLocalUnicast() {
				node.Addresses = append(node.Addresses, a.Addr())
			}
		}
	}
	if name == "" {
		return nil, errors.New("the node has no default route, so the uplink is not known")
	}
	fits := podMTU(node, options)
	wanted := w.MTU
	if wanted == 0 {
		wanted = fits
	}
	const leastIPv6 = 1280
	var findings []Finding
	if _, v6 := families(w); v6 && wanted < leastIPv6 {
		findings = append(findings, Finding{
			Severity: Error, Code: "MTUTooSmall", Object: "link " + name,
			Message: fmt.Sprintf("pods would have an MTU of %d, and IPv6 needs %d", wanted, leastIPv6),
			Remedy:  "raise the uplink's MTU or --mtu, or give the cluster IPv4 alone",
		})
	}
	if wanted > fits {
		findings = append(findings, Finding{
			Severity: Warning, Code: "MTUTooLarge", Object: fmt.Sprintf("--mtu=%d", w.MTU),
			Message: fmt.Sprintf("the uplink %s takes %d, which leaves %d for pods: larger packets are cut in pieces or lost", name, options.Uplink.MTU, fits),
			Remedy:  "leave --mtu away, so that it follows from the uplink",
		})
	}
	return findings, nil
}

// podMTU is what pods get on a node.
func podMTU(node cluster.Node, o mesh.Options) int {
	config, _ := mesh.Plan(cluster.Snapshot{Self: node.Name, Nodes: []cluster.Node{node}}, o)
	return config.MTU
}

// network is a network that has a name.
type network struct {
	name   string
	flag   string
	prefix netip.Prefix
}

// named returns the networks of the flags.
func named(w Wanted) []network {
	var all []network
	for _, of := range []struct {
		name, flag string
		prefixes   []netip.Prefix
	}{
		{"the pods' network", "--cluster-cidr", w.ClusterCIDRs},
		{"the Services' network", "--service-cidr", w.ServiceCIDRs},
		{"the nodes' network", "--node-cidr", w.NodeCIDRs},
	} {
		for _, p := range of.prefixes {
			all = append(all, network{of.name, of.flag, p})
		}
	}
	return all
}

// networks looks for networks that overlap where they must not.
func networks(f Facts, w Wanted) ([]Finding, error) {
	var errs []error
	if len(w.ClusterCIDRs) == 0 {
		errs = append(errs, errors.New("say --cluster-cidr, and --service-cidr, as the daemon has them, to hold them against the node's networks"))
	}
	var findings []Finding
	all := named(w)
	for i, a := range all {
		for _, b := range all[i+1:] {
			if a.prefix.Overlaps(b.prefix) {
				findings = append(findings, Finding{
					Severity: Error, Code: "NetworksOverlap", Object: fmt.Sprintf("%s=%s", a.flag, a.prefix),
					Message: fmt.Sprintf("%s overlaps %s, %s: what is sent there reaches the wrong one", a.name, b.name, b.prefix),
					Remedy:  fmt.Sprintf("choose others when the cluster is created, or correct %s and %s to what it was created with", a.flag, b.flag),
				})
			}
		}
	}
	for _, n := range all {
		if n.flag != "--node-cidr" {
			findings = append(findings, onNode(f, n)...)
		}
	}
	return findings, errors.Join(append(errs, f.Links.Err, f.Routes.Err)...)
}

// onNode looks for addresses and routes of the node in a network of pods or Services. There is one finding for each link.
func onNode(f Facts, n network) []Finding {
	var findings []Finding
	seen := map[string]bool{}
	for _, l := range f.Links.Value {
		// On dummy links Services' addresses stand rightly (kube-proxy in ipvs mode, node-local DNS).
		if isOwn(l.Name) || leftoverOf(l) != "" || n.flag == "--service-cidr" && l.Type == "dummy" {
			seen[l.Name] = true
			continue
		}
		for _, a := range l.Addresses {
			if n.prefix.Contains(a.Addr()) && !seen[l.Name] {
				seen[l.Name] = true
				findings = append(findings, Finding{
					Severity: Error, Code: "NetworkHoldsNode", Object: fmt.Sprintf("%s=%s", n.flag, n.prefix),
					Message: fmt.Sprintf("%s holds the node's address %s on %s: what is sent there never reaches it, and the node may be cut off", n.name, a.Addr(), l.Name),
					Remedy:  "choose " + n.name + " apart from all networks of the nodes when the cluster is created, or correct " + n.flag,
				})
			}
		}
	}
	for _, r := range f.Routes.Value {
		if r.Destination.Bits() > 0 && n.prefix.Overlaps(r.Destination) && !isOwn(r.Link) && !seen[r.Link] {
			seen[r.Link] = true
			findings = append(findings, Finding{
				Severity: Warning, Code: "NetworkOverlapsRoute", Object: fmt.Sprintf("%s=%s", n.flag, n.prefix),
				Message: fmt.Sprintf("%s overlaps the route to %s by %s: the hosts there that have addresses in both cannot be reached", n.name, r.Destination, r.Link),
				Remedy:  "choose " + n.name + " apart from the networks that nodes and pods have to reach, or remove the route",
			})
		}
	}
	return findings
}
