package firewall

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/warren-cni/warren/pkg/cluster"
)

// The backends of iptables, by the ends of their programs' names. The kernel asks both about every packet, so what one drops is
// dropped; but a program that looks through one does not see the rules in the other.
const (
	nft    = "nft"
	legacy = "legacy"
)

// usage is what other programs have in one backend, in both families.
type usage struct {
	rules int
	// chains are those that other programs made, sorted.
	chains []string
}

// inspect counts what other programs have in a backend. It reads only the tables that stand: to ask the legacy programs for another
// one would make it.
func inspect(ctx context.Context, s suite) (usage, error) {
	var u usage
	for _, t := range s {
		saved, err := t.run(ctx, "", t.save)
		if err != nil {
			return usage{}, err
		}
		u.count(saved)
	}
	slices.Sort(u.chains)
	u.chains = slices.Compact(u.chains)
	return u, nil
}

// count adds the output of iptables-save.
func (u *usage) count(saved string) {
	for line := range strings.Lines(saved) {
		if declared, ok := strings.CutPrefix(line, ":"); ok {
			if fields := strings.Fields(declared); len(fields) > 1 && fields[1] == "-" && !ours(fields[0]) {
				u.chains = append(u.chains, fields[0])
			}
			continue
		}
		if rest, ok := strings.CutPrefix(line, "-A "); ok && !ours(rest) && !ours(jumpTarget(rest)) {
			u.rules++
		}
	}
}

// none is true where no other program uses the backend.
func (u usage) none() bool { return u.rules == 0 && len(u.chains) == 0 }

// kubernetes says how surely Kubernetes' own rules are in the backend: the kubelet makes a chain only to show that, and the rules of
// kube-proxy may be left over.
func (u usage) kubernetes() int {
	if slices.Contains(u.chains, "KUBE-IPTABLES-HINT") || slices.Contains(u.chains, "KUBE-KUBELET-CANARY") {
		return 2
	}
	if slices.ContainsFunc(u.chains, func(name string) bool { return strings.HasPrefix(name, "KUBE-") }) {
		return 1
	}
	return 0
}

// String names the rules and whose they seem to be, by the first words of the chains' names.
func (u usage) String() string {
	var owners []string
	for _, name := range u.chains {
		owner, _, _ := strings.Cut(name, "-")
		owners = append(owners, owner)
	}
	owners = slices.Compact(owners)
	if len(owners) == 0 {
		return fmt.Sprintf("%d rules in built-in chains", u.rules)
	}
	return fmt.Sprintf("%d rules, chains of %s", u.rules, strings.Join(owners, ", "))
}

// prefer returns the backend to use: the one that others use, for two of them the one that Kubernetes uses, else nft.
func prefer(found map[string]usage) string {
	n, haveNFT := found[nft]
	l, haveLegacy := found[legacy]
	switch {
	case !haveNFT:
		return legacy
	case !haveLegacy || l.none():
		return nft
	case n.none() || l.kubernetes() > n.kubernetes():
		return legacy
	default:
		return nft
	}
}

// survey inspects the backends whose programs are there. It returns those that can be read, and what is wrong with the others.
func survey(ctx context.Context, suites map[string]suite) (map[string]usage, error) {
	found := map[string]usage{}
	var errs []error
	for _, backend := range []string{nft, legacy} {
		if suites[backend] == nil {
			continue
		}
		u, err := inspect(ctx, suites[backend])
		if err != nil {
			errs = append(errs, fmt.Errorf("looking at the rules of iptables-%s: %w", backend, err))
			continue
		}
		found[backend] = u
	}
	return found, errors.Join(errs...)
}

// decide returns the backend to use. A backend that cannot be read cannot be written: then what it is that cannot be read is an
// error, unless the other one is in use or this one will never do.
func decide(found map[string]usage, unread error) (string, error) {
	backend := prefer(found)
	if len(found) == 0 || unread != nil && found[backend].none() && !isUseless(unread) {
		return "", unread
	}
	return backend, nil
}

// choose looks at what other programs use and returns the backend to use.
func choose(ctx context.Context, log *slog.Logger, suites map[string]suite) (string, []cluster.Problem, error) {
	found, unread := survey(ctx, suites)
	backend, err := decide(found, unread)
	if err != nil {
		return "", nil, err
	}
	if unread != nil {
		log.Warn("leaving a backend of iptables alone", "error", unread)
	}
	log.Info("chose a backend of iptables", "backend", backend, "nft", found[nft].String(), "legacy", found[legacy].String())
	return backend, mixed(backend, found), nil
}

// isUseless says whether the programs of a backend will never do: the kernel does not have it, or it has rules of nft itself in the
// tables of iptables.
func isUseless(err error) bool {
	return strings.Contains(err.Error(), "not supported") || strings.Contains(err.Error(), "incompatible")
}

// mixed reports that other programs use both backends.
func mixed(chosen string, found map[string]usage) []cluster.Problem {
	if found[nft].none() || found[legacy].none() {
		return nil
	}
	return []cluster.Problem{{
		Code:   "BackendsMixed",
		Object: "iptables",
		Message: fmt.Sprintf("other programs have rules in both backends (nft: %s; legacy: %s): a packet has to pass both, so what one "+
			"program accepts the rules of another may drop; Warren's rules are in %s and hold all the same", found[nft], found[legacy], chosen),
		Remedy: "let all programs of this node use one backend (for example update-alternatives --set iptables /usr/sbin/iptables-nft, " +
			"the same for ip6tables, and in images that bring their own iptables), reboot the node",
	}}
}
