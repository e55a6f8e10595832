package firewall

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// RemovePorts removes what the reference plugin portmap has written for the pods of a network, in both backends of iptables, in nftables,
// and in both families: a pod's port of the node would otherwise lead to whoever has its address next. portmap's own chains go too where
// nothing of another network is left in them; it makes them again when it needs them. What is in nftables does not tell the network,
// and is removed for the containers named, as portmap's DEL does.
func RemovePorts(ctx context.Context, network string, containers []string) error {
	return portMaps{network: network, containers: containers, all: true}.remove(ctx)
}

// RemovePortsOf removes what portmap has written for some containers of a network, and leaves its own chains to it.
func RemovePortsOf(ctx context.Context, network string, containers ...string) error {
	return portMaps{network: network, containers: containers}.remove(ctx)
}

// portMaps are what is to be removed: those of some containers of a network, or those of all, and then portmap's own chains, too, where
// nobody else needs them.
type portMaps struct {
	network    string
	containers []string
	all        bool
}

// remove goes on after an error.
func (p portMaps) remove(ctx context.Context) error {
	return errors.Join(p.removeIPTables(ctx), p.removeNFT())
}

// removeNFT removes them from nftables.
func (p portMaps) removeNFT() error {
	s, err := openSocket()
	if err != nil {
		return err
	}
	return each(netfilter.Families[:], func(f netfilter.Family) error { return s.removePorts(f, p) })
}

// removeIPTables removes them from both backends of iptables, or from the one that will do: portmap has the same programs.
func (p portMaps) removeIPTables(ctx context.Context) error {
	suites, err := findSuites(programs{}, "")
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range netfilter.Families {
		var useless []error
		looked := false
		for _, backend := range []string{nft, legacy} {
			t := suites[backend][f]
			if t == nil {
				continue
			}
			saved, err := t.readAll(ctx)
			if text := p.without(saved["nat"]); err == nil && text != "" {
				err = t.write(ctx, text)
			}
			if err == nil {
				looked = true
				continue
			}
			err = fmt.Errorf("removing ports of the node by iptables-%s (%s): %w", backend, f, err)
			if isUseless(err) {
				useless = append(useless, err)
			} else {
				errs = append(errs, err)
			}
		}
		if !looked {
			errs = append(errs, useless...)
		}
	}
	return errors.Join(errs...)
}

// The chains of portmap. A pod has one of its own, to which the first of these leads by a rule that names network and container.
const (
	portChain, portMasqChain, portMarkChain = "CNI-HOSTPORT-DNAT", "CNI-HOSTPORT-MASQ", "CNI-HOSTPORT-SETMARK"
	podPortChain                            = "CNI-DN-"
)

// without returns the input of iptables-restore that takes the ports out of a table, "" where there are none.
func (p portMaps) without(saved string) string {
	var drop, jumps, pods []string
	left := 0
	declared := map[string]bool{}
	for line := range strings.Lines(saved) {
		line = strings.TrimSpace(line)
		if name, ok := strings.CutPrefix(line, ":"); ok {
			name, _, _ = strings.Cut(name, " ")
			declared[name] = true
			continue
		}
		rule, ok := strings.CutPrefix(line, "-A ")
		if !ok {
			continue
		}
		name, _, _ := strings.Cut(rule, " ")
		target := jumpTarget(rule)
		switch {
		case name == portChain && strings.HasPrefix(target, podPortChain) && p.have(rule):
			drop = append(drop, "-D "+rule)
			pods = append(pods, target)
		case name == portChain:
			left++
		case target == portChain || target == portMasqChain:
			jumps = append(jumps, "-D "+rule)
		}
	}
	slices.Sort(pods)
	gone := slices.Compact(pods)
	if left == 0 && p.all {
		drop = append(drop, jumps...)
		gone = append(gone, portChain, portMasqChain, portMarkChain)
	}
	gone = slices.DeleteFunc(gone, func(name string) bool { return !declared[name] })
	if len(drop)+len(gone) == 0 {
		return ""
	}
	lines := append([]string{"*nat"}, drop...)
	for _, command := range []string{"-F ", "-X "} { // a chain that another jumps to cannot go
		for _, name := range gone {
			lines = append(lines, command+name)
		}
	}
	return strings.Join(append(lines, "COMMIT"), "\n") + "\n"
}

// have says whether a rule of portmap's is one of them, by its comment.
func (p portMaps) have(rule string) bool {
	comment := fmt.Sprintf("dnat name: %q id: ", p.network)
	return slices.ContainsFunc(words(rule), func(word string) bool {
		id, ok := strings.CutPrefix(word, comment)
		return ok && (p.all || slices.ContainsFunc(p.containers, func(c string) bool { return strings.HasPrefix(id, strconv.Quote(c)) }))
	})
}
