package firewall

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/preflight"
)

// feature is a match or target that rules of Warren's use, with a rule that does, and the kernel module that has it.
type feature struct {
	name, module, table string
	args                []string
}

// matchSet is the one that needs a set to be tried with.
const matchSet = "match set"

// features are those of pkg/guard and pkg/policy, which a test compares with them.
func features(f netfilter.Family) []feature {
	self, rpfilter := "192.0.2.1", "ipt_rpfilter"
	if f == netfilter.IPv6 {
		self, rpfilter = "2001:db8::1", "ip6t_rpfilter"
	}
	return []feature{
		{"match addrtype", "xt_addrtype", "raw", []string{"-m", "addrtype", "--src-type", "LOCAL", "-j", "RETURN"}},
		{"match comment", "xt_comment", "mangle", []string{"-m", "comment", "--comment", "x", "-j", "RETURN"}},
		{"match connmark", "xt_connmark", "mangle", []string{"-m", "connmark", "--mark", "0x1/0x1", "-j", "DROP"}},
		{"match conntrack", "xt_conntrack", "mangle", []string{"-m", "conntrack", "--ctstate", "INVALID,UNTRACKED", "-j", "DROP"}},
		{"match limit", "xt_limit", "mangle", []string{"-m", "limit", "--limit", "10/second", "--limit-burst", "50", "-j", "RETURN"}},
		{"match mark", "xt_mark", "mangle", []string{"-m", "mark", "--mark", "0x1/0x1", "-j", "RETURN"}},
		{"match rpfilter", rpfilter, "raw", []string{"-m", "rpfilter", "--invert", "-j", "DROP"}},
		{"match sctp", "xt_sctp", "mangle", []string{"-p", "sctp", "-m", "sctp", "--dport", "1:7", "-j", "RETURN"}},
		{matchSet, "xt_set", "mangle", []string{"-m", "set", "--match-set", netfilter.SetName(f, "TRY", string(netfilter.HashIP)), "src", "-j", "RETURN"}},
		{"match tcp", "xt_tcpudp", "mangle", []string{"-p", "tcp", "-m", "tcp", "--syn", "-j", "RETURN"}},
		{"match udp", "xt_tcpudp", "mangle", []string{"-p", "udp", "-m", "udp", "--dport", "53", "-j", "RETURN"}},
		{"target MARK", "xt_mark", "mangle", []string{"-j", "MARK", "--set-xmark", "0x1/0x1"}},
		{"target MASQUERADE", "xt_MASQUERADE", "nat", []string{"-j", "MASQUERADE", "--random-fully"}},
		{"target NFLOG", "xt_NFLOG", "mangle", []string{"-j", "NFLOG", "--nflog-group", "87", "--nflog-size", "96", "--nflog-prefix", "x"}},
		{"target SNAT", "xt_nat", "nat", []string{"-j", "SNAT", "--to-source", self}},
		{"target TCPMSS", "xt_TCPMSS", "mangle", []string{"-p", "tcp", "-m", "tcp", "--tcp-flags", "SYN,RST", "SYN", "-j", "TCPMSS", "--clamp-mss-to-pmtu"}},
	}
}

// Try makes a set of each type and a rule with each match and target that Warren uses, in both families, and returns those that
// cannot be made. It leaves what it made: it is for a network namespace that is thrown away, the calling thread's.
func Try(ctx context.Context, backend string) ([]preflight.Lack, error) {
	s, err := openSocket()
	if err != nil {
		return nil, err
	}
	return try(ctx, programs{}, kernelSets{s}, backend)
}

func try(ctx context.Context, x execer, sets ipsets, backend string) ([]preflight.Lack, error) {
	suites, err := findSuites(x, backend)
	if err != nil {
		return nil, err
	}
	var lacks []preflight.Lack
	for _, f := range netfilter.Families {
		without := trySets(sets, f)
		lacks = append(lacks, without...)
		wanted := features(f)
		if len(without) > 0 {
			wanted = slices.DeleteFunc(wanted, func(one feature) bool { return one.name == matchSet }) // for lack of a set it could not be told
		}
		lacks = append(lacks, suites[backend][f].try(ctx, f, wanted)...)
	}
	return lacks, ctx.Err()
}

// trySets makes a set of each type and returns the types that cannot be.
func trySets(sets ipsets, f netfilter.Family) []preflight.Lack {
	var lacks []preflight.Lack
	for typ, module := range map[netfilter.SetType]string{
		netfilter.HashIP: "ip_set_hash_ip", netfilter.HashNet: "ip_set_hash_net", netfilter.HashIPPort: "ip_set_hash_ipport",
	} {
		if err := sets.Create(netfilter.SetName(f, "TRY", string(typ)), set{typ: typ, family: f, max: 1}); err != nil {
			lacks = append(lacks, preflight.Lack{Feature: fmt.Sprintf("set %s (%s)", typ, f), Module: module, Err: err})
		}
	}
	return lacks
}

// try writes rules with all features, and where that fails one by one to find those that cannot be had.
func (t *tools) try(ctx context.Context, f netfilter.Family, wanted []feature) []preflight.Lack {
	var all strings.Builder
	for _, table := range []string{"raw", "mangle", "nat"} {
		var rules []netfilter.Rule
		for _, one := range wanted {
			if one.table == table {
				rules = append(rules, netfilter.Rule{Args: one.args})
			}
		}
		all.WriteString(oneChain(table, rules...))
	}
	if t.write(ctx, all.String()) == nil {
		return nil
	}
	var lacks []preflight.Lack
	for _, one := range wanted {
		if err := t.write(ctx, oneChain(one.table, netfilter.Rule{Args: one.args})); err != nil {
			lacks = append(lacks, preflight.Lack{Feature: fmt.Sprintf("%s (%s)", one.name, f), Module: one.module, Err: err})
		}
	}
	return lacks
}

// oneChain is the input that makes a chain of rules in a table.
func oneChain(table string, rules ...netfilter.Rule) string {
	return netfilter.Delta{Table: table, Write: []netfilter.Chain{{Name: netfilter.Prefix + "-TRY", Rules: rules}}}.Render()
}
