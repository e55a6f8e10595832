package firewall

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/preflight"
)

// Look tells what other programs have in the packet filter, in the network namespace of the calling thread, and which backend of
// iptables rules of Warren's would be in. It changes nothing.
func Look(ctx context.Context) (string, preflight.Filter, error) {
	var seen preflight.Filter
	suites, err := findSuites(programs{}, "")
	if err != nil {
		return "", seen, err
	}
	found, unread := survey(ctx, suites)
	backend, err := decide(found, unread)
	if err != nil {
		return "", seen, err
	}
	seen.Problems = mixed(backend, found)
	for _, u := range found {
		seen.Chains = append(seen.Chains, u.chains...)
	}
	slices.Sort(seen.Chains)
	seen.Chains = slices.Compact(seen.Chains)
	if unread != nil && strings.Contains(unread.Error(), "not supported") { // what the kernel does not have holds no chains
		unread = nil
	}
	s, err := openSocket()
	if err == nil {
		seen.Tables, err = s.tables()
	}
	return backend, seen, errors.Join(unread, err)
}

// tables returns the names of all tables of nftables, those of iptables-nft among them, sorted; none where the kernel has no nftables.
func (s *socket) tables() ([]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.begin(nftMessage|unix.NFT_MSG_GETTABLE, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	s.messages = append(s.messages, unix.AF_UNSPEC, nl.NFNETLINK_V0, 0, 0) // struct nfgenmsg
	var names []string
	err := s.exchange(func(message []byte) {
		for typ, v := range attributesOf(message) {
			if typ == unix.NFTA_TABLE_NAME {
				names = append(names, unix.ByteSliceToString(v))
			}
		}
	})
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) { // nobody answers for that subsystem
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing the tables of nftables: %w", err)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}
