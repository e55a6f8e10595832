// Package preflight says what on a node keeps Warren from working, or will disturb it: what was read from the node and what is
// wanted in, findings out, each with what to do. It is pure.
//
// A fact that could not be read is no finding: what depends on it is reported as not checked, with the reason, so that the absence
// of findings says no more than it should. Nothing of Warren's own on the node, a running daemon's rules, links or socket, is a
// finding.
package preflight

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Severity says how bad a finding is.
type Severity string

// The severities, the worst first.
const (
	// Error: Warren cannot work, or not as safely as it promises, until it is mended.
	Error Severity = "error"
	// Warning: it works, until what is named disturbs it, or in part.
	Warning Severity = "warning"
	// Note: nothing has to be done, but somebody may look for it one day.
	Note Severity = "note"
)

// Finding is something on the node, and what to do about it.
type Finding struct {
	Severity Severity `json:"severity"`
	// Code is stable and can be searched for, for example "PortTaken".
	Code string `json:"code"`
	// Object is the file, link, rule or setting.
	Object string `json:"object"`
	// Message says what is wrong and what follows from it, Remedy what to do.
	Message string `json:"message"`
	Remedy  string `json:"remedy"`
}

// Result is what came of one check.
type Result struct {
	// Check is what was looked at.
	Check    string    `json:"check"`
	Findings []Finding `json:"findings"`
	// NotChecked are the reasons for which a part of it could not be looked at.
	NotChecked []string `json:"notChecked,omitempty"`
}

// Reading is a fact, or why it could not be read.
type Reading[T any] struct {
	Value T
	Err   error
}

// Read makes a Reading of what a function returns.
func Read[T any](value T, err error) Reading[T] { return Reading[T]{Value: value, Err: err} }

// Wanted is how Warren is to be run.
type Wanted struct {
	ClusterCIDRs, ServiceCIDRs, NodeCIDRs []netip.Prefix
	Encrypted                             bool
	// KernelOnly and UserSpaceOnly say whose WireGuard it has to be.
	KernelOnly, UserSpaceOnly bool
	Port                      uint16
	// MTU is that of pods and tunnel; 0 where it follows from the uplink.
	MTU int
	// Conflist is the path of Warren's own.
	Conflist string
}

// Facts are what was read from a node.
type Facts struct {
	// Kernel is its release, for example "6.1.0-18-amd64".
	Kernel Reading[string]
	// WireGuard and TUN say whether the kernel has them.
	WireGuard, TUN Reading[bool]
	// Lacks are what rules need and cannot have.
	Lacks Reading[[]Lack]
	// Filter is what other programs have in the packet filter.
	Filter     Reading[Filter]
	Forwarding Reading[Forwarding]
	// Advertised are the links whose default route came by router advertisement.
	Advertised Reading[[]Advertised]
	Links      Reading[[]Link]
	Routes     Reading[[]Route]
	// Sockets are those on the tunnel's UDP port that are not Warren's own.
	Sockets Reading[[]Socket]
	// IPVS is true where kube-proxy goes round the packet filter.
	IPVS Reading[bool]
	// Ahead are the files that the container runtime reads before Warren's.
	Ahead Reading[[]Ahead]
	// Programs are the names of the processes that run, as the kernel shortens them to 15 characters.
	Programs Reading[[]string]
	// Networkd and NetworkManager are the texts of their configuration in the order in which they are read: a later one overrides.
	Networkd, NetworkManager Reading[[]string]
	// UFW are the texts of ufw's files: its defaults and the rules that its user has added. Firewalld are zones of firewalld.
	UFW       Reading[[]string]
	Firewalld Reading[Zones]
	// Directories are those that Warren writes to.
	Directories Reading[[]Directory]
	// Admission are the problems that were found with the admission policies.
	Admission Reading[[]cluster.Problem]
}

// Lack is something that rules need and that the kernel, or iptables, does not have.
type Lack struct {
	// Feature is for example "match set (ipv4)", Module the kernel module that has it.
	Feature, Module string
	Err             error
}

// Filter is what other programs have in the packet filter.
type Filter struct {
	// Chains are their chains in iptables, Tables the names of the tables of nftables.
	Chains, Tables []string
	Problems       []cluster.Problem
}

// Forwarding says in which families the node forwards packets.
type Forwarding struct{ IPv4, IPv6 bool }

// Advertised is a link whose IPv6 default route came by router advertisement.
type Advertised struct {
	Link string
	// AcceptRA is the setting: 0 not at all, 1 unless the node forwards, 2 always.
	AcceptRA string
}

// Link is a network interface.
type Link struct {
	Name string
	// Type is the kernel's, for example "veth".
	Type      string
	Up        bool
	MTU       int
	Addresses []netip.Prefix
}

// Route is a route that leads out of a link.
type Route struct {
	Destination netip.Prefix
	Link        string
	// Metric is its priority: of two routes to the same destination the kernel takes that with the smaller one.
	Metric int
}

// isDefault says whether it is a default route, Warren's own aside.
func (r Route) isDefault() bool { return r.Destination.Bits() == 0 && !isOwn(r.Link) }

// Socket is a UDP socket.
type Socket struct {
	Address netip.AddrPort
	// Holder is the program and its process ID; empty where it is not known.
	Holder string
}

// Ahead is a CNI configuration that sorts before Warren's.
type Ahead struct {
	Path string
	// Delegates says that it calls Warren.
	Delegates bool
	// Err says why it cannot be understood.
	Err error
}

// Directory is a place that Warren writes to.
type Directory struct {
	Path string
	// Flag is the flag that names another one.
	Flag string
	// ForBinaries and ForBoot say what it is for: programs that are run, and what must not outlive a boot.
	ForBinaries, ForBoot bool
	// Problem says why nothing can be written there; empty where something can.
	Problem string
	// Memory says that it is in memory and empty after a boot, NoExec that programs there cannot be run.
	Memory, NoExec bool
}

// check is one thing to look at. What it cannot look at it returns as errors joined.
type check struct {
	name string
	run  func(Facts, Wanted) ([]Finding, error)
}

// Check looks at everything.
func Check(f Facts, w Wanted) []Result {
	checks := []check{
		{"kernel", kernel},
		{"WireGuard", wireGuard},
		{"packet filter", packetFilter},
		{"iptables backend", backend},
		{"forwarding", forwarding},
		{"UDP port", port},
		{"MTU", mtu},
		{"networks", networks},
		{"other CNIs", otherCNIs},
		{"firewalls", firewalls},
		{"network managers", networkManagers},
		{"kube-proxy", kubeProxy},
		{"directories", directories},
		{"admission policies", admission},
	}
	results := make([]Result, 0, len(checks))
	for _, c := range checks {
		findings, err := c.run(f, w)
		slices.SortStableFunc(findings, func(a, b Finding) int {
			return cmp.Or(a.Severity.rank()-b.Severity.rank(), strings.Compare(a.Code, b.Code), strings.Compare(a.Object, b.Object))
		})
		results = append(results, Result{Check: c.name, Findings: append([]Finding{}, findings...), NotChecked: reasons(err)})
	}
	return results
}

// rank orders severities, the worst first.
func (s Severity) rank() int { return slices.Index([]Severity{Error, Warning, Note}, s) }

// Count returns how many findings of a severity there are.
func Count(results []Result, s Severity) int {
	n := 0
	for _, r := range results {
		for _, f := range r.Findings {
			if f.Severity == s {
				n++
			}
		}
	}
	return n
}

// reasons returns the texts of joined errors, each once.
func reasons(err error) []string {
	if err == nil {
		return nil
	}
	var texts []string
	if joined, ok := err.(interface{ Unwrap() []error }); ok { // what errors.Join made here, and no deeper
		for _, e := range joined.Unwrap() {
			texts = append(texts, reasons(e)...)
		}
	} else {
		texts = []string{strings.ReplaceAll(err.Error(), "\n", "; ")}
	}
	slices.Sort(texts)
	return slices.Compact(texts)
}

// ofProblem makes a finding of a problem that the daemon reports in the same words.
func ofProblem(s Severity, p cluster.Problem) Finding {
	return Finding{Severity: s, Code: p.Code, Object: p.Object, Message: p.Message, Remedy: p.Remedy}
}
