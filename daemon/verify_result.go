package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/warren-cni/warren/pkg/capture"
)

// conclusion is what a verification comes to.
type conclusion string

// The conclusions.
const (
	proven    conclusion = "proven"
	violated  conclusion = "violated"
	notProven conclusion = "not proven"
)

// verification is what `warrend verify` shows.
type verification struct {
	Node       string     `json:"node"`
	Conclusion conclusion `json:"conclusion"`
	// Violations are what contradicts that traffic is encrypted, Doubts what keeps it from being proven.
	Violations []string `json:"violations,omitempty"`
	Doubts     []string `json:"doubts,omitempty"`
	// Notes say what one has to know to read the conclusion rightly.
	Notes []string `json:"notes,omitempty"`
	// Encryption is "kernel", "userspace", "off" or "unknown", Guard what the guards cover.
	Encryption string  `json:"encryption"`
	Port       uint16  `json:"port,omitempty"`
	Guard      string  `json:"guard"`
	Seconds    float64 `json:"seconds"`
	// InClear and WireGuard are the packets on all links.
	InClear   capture.Traffic `json:"inClear"`
	WireGuard capture.Traffic `json:"wireguard"`
	Links     []capture.Link  `json:"links"`
	// Dropped packets were not counted because there were too many, Unjudged ones because their link was unknown.
	Dropped  int         `json:"dropped"`
	Unjudged int         `json:"unjudged"`
	Peers    []peerProof `json:"peers"`
	// GuardDrift and Drift are where the kernel is not as planned.
	GuardDrift []string `json:"guardDrift,omitempty"`
	Drift      []string `json:"drift,omitempty"`
}

// peerProof is how another node answered.
type peerProof struct {
	Node          string    `json:"node"`
	Endpoint      string    `json:"endpoint,omitempty"`
	LastHandshake time.Time `json:"lastHandshake,omitzero"`
	// WireGuard are the packets to and from the peer's endpoints.
	WireGuard capture.Traffic `json:"wireguard"`
	Probes    []probeProof    `json:"probes"`
}

// probeProof is what became of the probes to one address.
type probeProof struct {
	Address  netip.Addr `json:"address"`
	Sent     int        `json:"sent"`
	Lost     int        `json:"lost"`
	MinMS    float64    `json:"minMs,omitempty"`
	MedianMS float64    `json:"medianMs,omitempty"`
	MaxMS    float64    `json:"maxMs,omitempty"`
	// Error is the last of sending.
	Error string `json:"error,omitempty"`
}

// evidence is what a verification is made of: what the daemon said before and after, what passed the links meanwhile, and what became
// of the probes.
type evidence struct {
	before, after meshFacts
	report        capture.Report
	probes        []*probed
	duration      time.Duration
}

// conclude makes a verification of the evidence. It is pure.
func conclude(e evidence) verification {
	status := e.after.Status
	v := verification{
		Node: status.Node, Encryption: status.Encryption.Mode, Port: status.Encryption.Port, Guard: status.Encryption.Guard,
		Seconds: e.duration.Seconds(), Links: e.report.Links, Dropped: e.report.Dropped, Unjudged: e.report.Unjudged,
		GuardDrift: unique(slices.Concat(e.before.GuardDrift, e.after.GuardDrift)),
		Drift:      unique(slices.Concat(e.before.Drift, e.after.Drift)),
		Peers:      e.peers(),
	}
	v.judgeLinks()
	v.judgeKernel()
	v.judgePeers()
	if others := e.after.NoPeers; len(others) > 0 {
		v.Doubts = append(v.Doubts, fmt.Sprintf("no tunnel leads to %d node(s), see `warrend status`: %s", len(others), strings.Join(others, ", ")))
	}
	if status.Encryption.Guard != "cluster-cidr" {
		v.Notes = append(v.Notes, "the cluster CIDR is not known (--cluster-cidr): addresses count as pods' only in podCIDRs that are known, and the guards cover only those")
	}
	if n := len(status.Problems); n > 0 {
		v.Notes = append(v.Notes, fmt.Sprintf("the node has %d problem(s), see `warrend status`", n))
	}
	v.settle()
	return v
}

// settle makes the conclusion of violations and doubts.
func (v *verification) settle() {
	switch {
	case len(v.Violations) > 0:
		v.Conclusion = violated
	case len(v.Doubts) > 0:
		v.Conclusion = notProven
	default:
		v.Conclusion = proven
	}
}

// unencrypted is the verification of a node with --encryption off: there is nothing to look for.
func unencrypted(f meshFacts) verification {
	v := verification{
		Node: f.Status.Node, Encryption: f.Status.Encryption.Mode, Guard: f.Status.Encryption.Guard,
		Violations: []string{"encryption is off (--encryption off): pod traffic between nodes is in clear"},
	}
	v.settle()
	return v
}

// peers gathers what is known of each peer.
func (e evidence) peers() []peerProof {
	peers := make([]peerProof, len(e.before.Peers))
	byNode := make(map[string]*peerProof, len(peers))
	endpoints := map[string]map[string]bool{}
	for i, f := range e.before.Peers {
		peers[i] = peerProof{Node: f.Node, Endpoint: f.Endpoint}
		byNode[f.Node], endpoints[f.Node] = &peers[i], map[string]bool{f.Endpoint: true}
	}
	for _, device := range slices.Concat(e.before.Status.Peers, e.after.Status.Peers) {
		p := byNode[device.Node]
		if p == nil {
			continue
		}
		p.Endpoint, endpoints[device.Node][device.Endpoint] = device.Endpoint, true // the last is where it is now
		if device.LastHandshake.After(p.LastHandshake) {
			p.LastHandshake = device.LastHandshake
		}
	}
	for node, known := range endpoints {
		for text := range known {
			if remote, err := netip.ParseAddrPort(text); err == nil { // a peer behind NAT may have none
				byNode[node].WireGuard = byNode[node].WireGuard.Plus(e.report.Remotes[remote])
			}
		}
	}
	for _, t := range e.probes {
		byNode[t.node].Probes = append(byNode[t.node].Probes, t.proof())
	}
	return peers
}

// proof sums up the probes to an address.
func (t *probed) proof() probeProof {
	p := probeProof{Address: t.address, Sent: t.sent, Lost: t.sent - len(t.times)}
	if t.err != nil {
		p.Error = t.err.Error()
	}
	if len(t.times) > 0 {
		times := slices.Sorted(slices.Values(t.times))
		ms := func(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
		p.MinMS, p.MedianMS, p.MaxMS = ms(times[0]), ms(times[len(times)/2]), ms(times[len(times)-1])
	}
	return p
}

// judgeLinks looks for packets in clear, and whether the capture saw all there was.
func (v *verification) judgeLinks() {
	for _, l := range v.Links {
		v.InClear, v.WireGuard = v.InClear.Plus(l.Clear), v.WireGuard.Plus(l.WireGuard)
		if l.Clear.Total() == 0 {
			continue
		}
		var examples []string
		for _, e := range l.Examples {
			examples = append(examples, e.String())
		}
		v.Violations = append(v.Violations, fmt.Sprintf("link %s carried packets of pods in clear: %d sent, %d received, %d of them with the marker of these probes; %s",
			l.Name, l.Clear.Sent, l.Clear.Received, l.Marked.Total(), strings.Join(examples, "; ")))
	}
	if v.Dropped > 0 {
		v.Doubts = append(v.Doubts, fmt.Sprintf("the kernel dropped %d packets that were not looked at, because there were too many", v.Dropped))
	}
	if v.Unjudged > 0 {
		v.Doubts = append(v.Doubts, fmt.Sprintf("%d packets could not be judged: their links have gone, or have an unknown header", v.Unjudged))
	}
}

// judgeKernel looks for rules, sets and peers that are not as planned.
func (v *verification) judgeKernel() {
	for _, text := range v.GuardDrift {
		v.Violations = append(v.Violations, "a guard does not stand as planned: "+text)
	}
	for _, text := range v.Drift {
		v.Violations = append(v.Violations, "the kernel is not as planned: "+text)
	}
	if v.Encryption == "unknown" {
		v.Doubts = append(v.Doubts, "the tunnel does not answer")
	}
}

// judgePeers looks whether every other node answered through the tunnel.
func (v *verification) judgePeers() {
	if len(v.Peers) == 0 {
		v.Notes = append(v.Notes, "the node has no peer, so no traffic belongs into the tunnel")
		return
	}
	if v.WireGuard.Total() == 0 {
		v.Doubts = append(v.Doubts, "no WireGuard packet was seen on any link, so that the absence of others tells nothing")
	}
	for _, p := range v.Peers {
		answered := false
		if len(p.Probes) == 0 {
			v.Doubts = append(v.Doubts, fmt.Sprintf("no probe could be sent to node %s, which has no address in the tunnel of a family that this node has one of: "+
				"compare spec.podCIDRs of both Nodes, and see `warrend status` for podCIDRs that were refused", p.Node))
		}
		for _, probe := range p.Probes {
			if probe.Sent > 0 && probe.Lost == probe.Sent {
				v.Doubts = append(v.Doubts, strings.TrimSuffix(fmt.Sprintf("node %s answered none of %d probes to %s: %s", p.Node, probe.Sent, probe.Address, probe.Error), ": "))
			}
			if probe.Sent == 0 {
				v.Doubts = append(v.Doubts, fmt.Sprintf("no probe was sent to node %s at %s", p.Node, probe.Address))
			}
			answered = answered || probe.Lost < probe.Sent
		}
		if answered && p.WireGuard.Total() == 0 && v.WireGuard.Total() > 0 {
			v.Doubts = append(v.Doubts, fmt.Sprintf("node %s answered, but no WireGuard packet to or from its endpoint %s was seen", p.Node, p.Endpoint))
		}
	}
}

// printVerification prints a verification for people or for programs.
func printVerification(w io.Writer, v verification, output string, now time.Time) error {
	if output == "json" {
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		encoder.SetEscapeHTML(false)
		return encoder.Encode(v)
	}
	var b strings.Builder
	t := tabwriter.NewWriter(&b, 0, 4, 2, ' ', 0)
	fmt.Fprintf(t, "NODE\t%s\n", v.Node)
	if v.Encryption == "off" {
		fmt.Fprintln(t, "ENCRYPTION\tOFF")
	} else {
		fmt.Fprintf(t, "ENCRYPTION\tWireGuard (%s), UDP port %d\n", v.Encryption, v.Port)
		fmt.Fprintf(t, "GUARDS\t%s\n", standing(v.GuardDrift, "as planned, covering "+v.Guard))
		fmt.Fprintf(t, "KERNEL\t%s\n", standing(v.Drift, "as planned"))
		fmt.Fprintf(t, "WIRE\t%gs: %d packets in clear, %d of WireGuard, %d not looked at\n",
			v.Seconds, v.InClear.Total(), v.WireGuard.Total(), v.Dropped+v.Unjudged)
	}
	_ = t.Flush() // a strings.Builder takes everything
	printLinks(&b, v.Links)
	printProofs(&b, v.Peers, now)
	for _, note := range v.Notes {
		fmt.Fprintf(&b, "\nNote: %s.\n", note)
	}
	printConclusion(&b, v)
	_, err := io.WriteString(w, b.String())
	return err
}

// standing says whether something is as planned.
func standing(drift []string, well string) string {
	if len(drift) == 0 {
		return well
	}
	return fmt.Sprintf("%d difference(s) from the plan", len(drift))
}

// printLinks prints the links that carried something of interest.
func printLinks(b *strings.Builder, links []capture.Link) {
	t := tabwriter.NewWriter(b, 0, 4, 3, ' ', 0)
	head := "\nLINK\tIN CLEAR\tWITH MARKER\tWIREGUARD SENT\tRECEIVED\n"
	for _, l := range links {
		if l.Clear.Total()+l.WireGuard.Total() > 0 {
			fmt.Fprintf(t, "%s%s\t%d\t%d\t%d\t%d\n", head, l.Name, l.Clear.Total(), l.Marked.Total(), l.WireGuard.Sent, l.WireGuard.Received)
			head = ""
		}
	}
	_ = t.Flush() // a strings.Builder takes everything
}

// printProofs prints how the peers answered.
func printProofs(b *strings.Builder, peers []peerProof, now time.Time) {
	if len(peers) == 0 {
		return
	}
	b.WriteString("\n")
	t := tabwriter.NewWriter(b, 0, 4, 3, ' ', 0)
	fmt.Fprintln(t, "PEER\tADDRESS\tPROBES\tLOST\tMIN\tMEDIAN\tMAX\tLAST HANDSHAKE\tWIREGUARD PACKETS")
	for _, p := range peers {
		for _, probe := range p.Probes {
			ms := func(value float64) string {
				if probe.Lost == probe.Sent {
					return "-"
				}
				return fmt.Sprintf("%.2fms", value)
			}
			fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%s\t%s\t%s\t%s\t%d\n", p.Node, probe.Address, probe.Sent, probe.Lost,
				ms(probe.MinMS), ms(probe.MedianMS), ms(probe.MaxMS), ago(now, p.LastHandshake), p.WireGuard.Total())
		}
	}
	_ = t.Flush() // a strings.Builder takes everything
}

// printConclusion prints what it comes to and why.
func printConclusion(b *strings.Builder, v verification) {
	if v.Conclusion == proven {
		fmt.Fprintf(b, "\nPROVEN: within %gs nothing of pods left or entered node %s in clear.\n", v.Seconds, v.Node)
		return
	}
	fmt.Fprintf(b, "\n%s:\n", strings.ToUpper(string(v.Conclusion)))
	for _, text := range slices.Concat(v.Violations, v.Doubts) {
		fmt.Fprintf(b, "  %s\n", text)
	}
}
