package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"strings"

	"github.com/warren-cni/warren/pkg/policy"
)

// printExplanation prints an explanation for people or for programs.
func printExplanation(w io.Writer, e explanation, output string) error {
	if output == "json" {
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		return encoder.Encode(e)
	}
	var b strings.Builder
	for i, v := range e.Verdicts {
		printHeading(&b, e, v)
		reasons := printReasons(v)
		if i+1 < len(e.Verdicts) && printReasons(e.Verdicts[i+1]) == reasons {
			continue // one text for the two families, or for all numbers of a port's name
		}
		b.WriteString("\n" + reasons)
		if i+1 < len(e.Verdicts) {
			b.WriteString("\n")
		}
	}
	if len(e.Problems) > 0 {
		b.WriteString("\nThe kernel may differ from this verdict:")
		printProblems(&b, e.Problems)
	}
	if e.Node != "" {
		fmt.Fprintf(&b, "\nAs warrend on node %s sees the cluster.\n", e.Node)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// printHeading prints the verdict at a glance.
func printHeading(b *strings.Builder, e explanation, v policy.Verdict) {
	what := "ICMP (no --port was given)"
	if v.Flow.Protocol != policy.ICMP {
		what = fmt.Sprintf("%d/%s", v.Flow.Port, v.Flow.Protocol)
	}
	fmt.Fprintf(b, "%s  %s -> %s  %s\n", word(v.Allowed), endText(e.From, v.From, v.Flow.Src), endText(e.To, v.To, v.Flow.Dst), what)
}

// word is a verdict in a word.
func word(allowed bool) string {
	if allowed {
		return "ALLOWED"
	}
	return "DENIED"
}

// endText names an end of a connection. asked is how the operator named it.
func endText(asked string, end policy.End, address netip.Addr) string {
	switch {
	case end.Pod != "":
		return fmt.Sprintf("%s (%s)", end.Pod, address)
	case end.Node != "" && strings.Contains(asked, "/"):
		return fmt.Sprintf("%s (host network of node %s, %s)", asked, end.Node, address)
	case end.Node != "":
		return fmt.Sprintf("node %s (%s)", end.Node, address)
	default:
		return address.String() + " (no pod)"
	}
}

// printReasons prints both directions and the notes.
func printReasons(v policy.Verdict) string {
	var b strings.Builder
	printSide(&b, "egress", "to", v.Egress)
	printSide(&b, "ingress", "from", v.Ingress)
	for _, note := range v.Notes {
		fmt.Fprintf(&b, "Note: %s.\n", note)
	}
	return b.String()
}

// printSide prints one direction with its policies and their rules.
func printSide(b *strings.Builder, name, peers string, s policy.Side) {
	where := ""
	if s.Node != "" {
		where = " on node " + s.Node
	}
	fmt.Fprintf(b, "%-7s  %s%s: %s\n", name, word(s.Allowed), where, s.Because)
	for _, p := range s.Policies {
		if len(p.Rules) == 0 {
			fmt.Fprintf(b, "  %s: has no %s rules\n", p.Name, name)
			continue
		}
		fmt.Fprintf(b, "  %s:\n", p.Name)
		for _, r := range p.Rules {
			if r.Allows {
				fmt.Fprintf(b, "    %s allows\n", r.Field)
			} else {
				fmt.Fprintf(b, "    %s does not match\n", r.Field)
			}
			printMatches(b, peers, r.Peers, r.Allows)
			printMatches(b, "port", r.Ports, r.Allows)
		}
	}
}

// printMatches prints what makes a rule match, or not: of one that allows what matches, of another all of the part in which
// nothing does.
func printMatches(b *strings.Builder, label string, matches []policy.Match, allows bool) {
	for _, m := range matches {
		if m.Matches && !allows {
			return
		}
	}
	for _, m := range matches {
		switch {
		case m.Matches:
			fmt.Fprintf(b, "      %-4s  %s\n", label, m.Text)
		case !allows:
			fmt.Fprintf(b, "      %-4s  %s: %s\n", label, m.Text, m.Why)
		}
	}
}
