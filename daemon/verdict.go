package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"text/tabwriter"

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
	printService(&b, e)
	printDrift(&b, e)
	for i, group := range groups(e.Verdicts) {
		if i > 0 {
			b.WriteString("\n")
		}
		printGroup(&b, e, group)
	}
	if len(e.Notes) > 0 {
		b.WriteString("\n")
		printNotes(&b, e.Notes)
	}
	if len(e.Problems) > 0 {
		b.WriteString("\nWhat this verdict rests on has problems:")
		printProblems(&b, e.Problems)
	}
	printAsked(&b, e)
	_, err := io.WriteString(w, b.String())
	return err
}

// printNotes prints what one has to know besides.
func printNotes(b *strings.Builder, notes []string) {
	for _, note := range notes {
		fmt.Fprintf(b, "Note: %s.\n", note)
	}
}

// printService prints the answer for a Service at a glance.
func printService(b *strings.Builder, e explanation) {
	if e.Service == nil {
		return
	}
	addresses := "headless"
	if len(e.Service.ClusterIPs) > 0 {
		addresses = strings.Join(texts(e.Service.ClusterIPs), ", ")
	}
	fmt.Fprintf(b, "%s  %s -> Service %s (%s)\n", e.Answer.word(), e.From, e.Service.Name, addresses)
	table := tabwriter.NewWriter(b, 0, 0, 2, ' ', 0)
	for _, p := range e.Service.Ports {
		fmt.Fprintf(table, "  %s\t%s\n", p.Port, p.text())
	}
	_ = table.Flush() // a strings.Builder takes everything
	b.WriteString("\n")
}

// text says how many endpoints of a port are reached.
func (p portAnswer) text() string {
	switch {
	case p.Endpoints == 0:
		return "no endpoint is ready, so nothing answers whatever policies say"
	case p.Unknown > 0:
		return fmt.Sprintf("allowed to %d of %d ready endpoints, unknown for %d", p.Allowed, p.Endpoints, p.Unknown)
	default:
		return fmt.Sprintf("allowed to %d of %d ready endpoints", p.Allowed, p.Endpoints)
	}
}

// printDrift prints where the kernel is not as planned.
func printDrift(b *strings.Builder, e explanation) {
	if len(e.Drift) == 0 {
		return
	}
	fmt.Fprintf(b, "The kernel of node %s disagrees with the plan. The next audit repairs it; until then the verdict is only the plan's:\n", e.Node)
	for _, d := range e.Drift {
		fmt.Fprintf(b, "  %s\n", d)
	}
	b.WriteString("\n")
}

// groups puts verdicts together that have the same reasons: of the two families, of the numbers behind a port's name, of the
// endpoints of a Service. What stands in the way comes first, and what gets no connections last.
func groups(verdicts []judged) [][]judged {
	var all [][]judged
	for _, v := range verdicts {
		at := slices.IndexFunc(all, func(group []judged) bool { return alike(group[0], v) })
		if at < 0 {
			all = append(all, []judged{v})
			continue
		}
		all[at] = append(all[at], v)
	}
	rank := func(group []judged) int {
		if !slices.ContainsFunc(group, func(v judged) bool { return !v.NotReady }) {
			return 2
		}
		return slices.Index([]answer{denied, allowed}, group[0].Answer) // unknown is before them
	}
	slices.SortStableFunc(all, func(a, b []judged) int { return rank(a) - rank(b) })
	return all
}

// alike tells whether the same rules decide two verdicts in the same way.
func alike(a, b judged) bool {
	return a.Answer == b.Answer && alikeSides(a.Egress, b.Egress) && alikeSides(a.Ingress, b.Ingress) && slices.Equal(a.Notes, b.Notes)
}

func alikeSides(a, b policy.Side) bool {
	match := func(a, b policy.Match) bool { return a.Matches == b.Matches && a.Text == b.Text }
	rule := func(a, b policy.Rule) bool {
		return a.Field == b.Field && slices.EqualFunc(a.Peers, b.Peers, match) && slices.EqualFunc(a.Ports, b.Ports, match)
	}
	return a.Because == b.Because && slices.EqualFunc(a.Policies, b.Policies, func(a, b policy.Policy) bool {
		return a.Name == b.Name && slices.EqualFunc(a.Rules, b.Rules, rule)
	})
}

// printGroup prints verdicts that are alike.
func printGroup(b *strings.Builder, e explanation, group []judged) {
	reasons, same := printReasons(group[0].Verdict), true
	for _, v := range group {
		printHeading(b, e, v)
		same = same && printReasons(v.Verdict) == reasons
	}
	b.WriteString("\n")
	if !same {
		fmt.Fprintf(b, "All for the same reasons, here in the words of the first (%s):\n", endText("", group[0].To, group[0].Flow.Dst))
	}
	b.WriteString(reasons)
}

// printHeading prints a verdict at a glance.
func printHeading(b *strings.Builder, e explanation, v judged) {
	what := "ICMP (no --port was given)"
	if v.Flow.Protocol != policy.ICMP {
		what = fmt.Sprintf("%d/%s", v.Flow.Port, v.Flow.Protocol)
	}
	to := e.To
	if e.Service != nil {
		to = "" // what was asked is no name of the endpoint
	}
	fmt.Fprintf(b, "%s  %s -> %s  %s", v.Answer.word(), endText(e.From, v.From, v.Flow.Src), endText(to, v.To, v.Flow.Dst), what)
	if v.Answer == unknown {
		fmt.Fprintf(b, "  (%s by the plan)", strings.ToLower(word(v.Allowed)))
	}
	if v.NotReady {
		b.WriteString("  (not ready)")
	}
	b.WriteString("\n")
}

// word is an answer in a word that is seen.
func (a answer) word() string { return strings.ToUpper(string(a)) }

// word is a verdict in a word.
func word(isAllowed bool) string {
	if isAllowed {
		return allowed.word()
	}
	return denied.word()
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
	printNotes(&b, v.Notes)
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

// printAsked prints who answered, and who else has a part in it.
func printAsked(b *strings.Builder, e explanation) {
	if e.Node == "" {
		return
	}
	fmt.Fprintf(b, "\nAs warrend on node %s sees the cluster.\n", e.Node)
	for _, u := range e.Unasked {
		fmt.Fprintf(b, "Node %s enforces a part of it; whether its kernel does as planned, its own warrend tells:\n  %s\n", u.Node, u.Ask)
	}
}
