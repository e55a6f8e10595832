package wgdevice

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/mesh"
)

// rulePriority puts our rules before those that lead to the main table.
const rulePriority = 8787

// nodeRules returns the sources for which the routes to nodes' own addresses are: the node's pods. What the node itself sends has
// another source, the tunnel's own packets among it, and never goes into the tunnel by these routes.
func nodeRules(want mesh.Config) []netip.Prefix {
	if len(want.Hosts) == 0 {
		return nil
	}
	sources := slices.Clone(want.PodCIDRs)
	for _, a := range want.Strays {
		sources = append(sources, netip.PrefixFrom(a, a.BitLen()))
	}
	return sources
}

// ruleDelta compares the sources from which rules are to lead to the table of the nodes' own addresses with our rules that stand: which lack
// theirs, and which rules are to go.
func ruleDelta(wanted []netip.Prefix, actual []netlink.Rule) (add []netip.Prefix, remove []netlink.Rule) {
	var have []netip.Prefix
	for _, r := range actual {
		source := prefixOf(r.Src)
		if r.Table == nodeTable && r.Priority == rulePriority && slices.Contains(wanted, source) && !slices.Contains(have, source) {
			have = append(have, source)
			continue
		}
		remove = append(remove, r)
	}
	for _, source := range wanted {
		if !slices.Contains(have, source) {
			add = append(add, source)
		}
	}
	return add, remove
}

// syncRules makes our rules lead from the wanted sources to the table of the nodes' own addresses. Those that come stand before others go,
// because a pod's address may be led there by the one, and then by the other; so where one cannot come, none goes.
func (k *kernel) syncRules(wanted []netip.Prefix, changes *Changes) error {
	actual, err := k.rules()
	if err != nil {
		return err
	}
	var errs []error
	add, remove := ruleDelta(wanted, actual)
	for _, source := range add {
		r := netlink.NewRule()
		r.Src, r.Table, r.Priority, r.Protocol = ipNet(source), nodeTable, rulePriority, RouteProtocol
		if err = k.RuleAdd(r); err != nil {
			errs = append(errs, fmt.Errorf("adding a rule from %s to table %d: %w", source, nodeTable, err))
			continue
		}
		changes.Routes++
	}
	if len(errs) > 0 {
		return errors.Join(errs...)
	}
	for i := range remove {
		if err = k.RuleDel(&remove[i]); err != nil {
			errs = append(errs, fmt.Errorf("deleting the rule from %s to table %d: %w", prefixOf(remove[i].Src), remove[i].Table, err))
			continue
		}
		changes.Routes++
	}
	return errors.Join(errs...)
}

// rules lists our rules.
func (k *kernel) rules() ([]netlink.Rule, error) {
	var ours []netlink.Rule
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := k.RuleList(family)
		if errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) {
			continue // a kernel without the family, or without rules, has none of ours
		}
		if err != nil {
			return nil, fmt.Errorf("listing rules: %w", err)
		}
		ours = append(ours, slices.DeleteFunc(list, func(r netlink.Rule) bool { return r.Protocol != RouteProtocol })...)
	}
	return ours, nil
}
