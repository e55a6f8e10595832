package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nlattr"
)

// The table that portmap uses on a node that has nftables and no iptables, and the chains of it that belong to no pod. A rule of a pod has
// the container as its comment.
const portTable = "cni_hostport"

var portFrame = []string{"prerouting", "output", "hostports_all"} //nolint:gochecknoglobals // a constant list

// portAttempts is how often a change is planned anew that another program's change came before.
const portAttempts = 10

// portRule is a rule in that table.
type portRule struct {
	chain, comment string
	handle         []byte
}

// removePorts removes ports from portmap's table of a family, and with all the table where no pod has a rule in it then.
func (s *socket) removePorts(f netfilter.Family, p portMaps) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	family, name := byte(unix.NFPROTO_IPV4), "ip "+portTable
	if f == netfilter.IPv6 {
		family, name = unix.NFPROTO_IPV6, "ip6 "+portTable
	}
	err := error(unix.ERESTART)
	for attempt := 0; attempt < portAttempts && errors.Is(err, unix.ERESTART); attempt++ {
		err = s.removePortsOnce(family, p)
	}
	if err != nil {
		return fmt.Errorf("removing ports of the node from nftables (`nft delete table %s` removes them, with those of other networks): %w", name, err)
	}
	return nil
}

// removePortsOnce is one attempt, which fails with ERESTART where another program has changed something meanwhile.
func (s *socket) removePortsOnce(family byte, p portMaps) error {
	generation, err := s.generation()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
		return nil // the kernel has no nftables
	}
	if err != nil {
		return err
	}
	rules, err := s.portRules(family)
	if err != nil || len(rules) == 0 {
		return err
	}
	ours := func(r portRule) bool { return slices.Contains(p.containers, r.comment) }
	stays := !p.all || slices.ContainsFunc(rules, func(r portRule) bool { return !ours(r) && !slices.Contains(portFrame, r.chain) })
	defer s.discard()
	s.beginNFT(unix.NFNL_MSG_BATCH_BEGIN, unix.AF_UNSPEC)
	s.messages = appendUint32(s.messages, nfnlBatchGenID, generation)
	begun := len(s.messages)
	if !stays {
		s.beginNFT(nftMessage|unix.NFT_MSG_DELTABLE, family)
		s.messages = appendString(s.messages, unix.NFTA_TABLE_NAME, portTable)
	}
	for _, r := range rules {
		if stays && ours(r) {
			s.beginNFT(nftMessage|unix.NFT_MSG_DELRULE, family)
			s.messages = appendString(s.messages, unix.NFTA_RULE_TABLE, portTable)
			s.messages = appendString(s.messages, unix.NFTA_RULE_CHAIN, r.chain)
			s.messages = appendAttr(s.messages, unix.NFTA_RULE_HANDLE, r.handle)
		}
	}
	if len(s.messages) == begun {
		return nil
	}
	return s.transact()
}

// The type of a message of nftables, and the attribute of a transaction by which it is refused where something has changed since
// (linux/netfilter/nfnetlink.h).
const (
	nftMessage     = unix.NFNL_SUBSYS_NFTABLES << 8
	nfnlBatchGenID = 1
)

// beginNFT starts a message of nftables, or one that begins a transaction of it.
func (s *socket) beginNFT(typ int, family byte) {
	s.begin(typ, unix.NLM_F_REQUEST)
	s.messages = append(s.messages, family, nl.NFNETLINK_V0, 0, 0) // struct nfgenmsg
	if typ == unix.NFNL_MSG_BATCH_BEGIN {
		binary.BigEndian.PutUint16(s.messages[len(s.messages)-2:], unix.NFNL_SUBSYS_NFTABLES)
	}
}

// transact sends the messages that wait, of which the first begins a transaction, with what ends it. The kernel does all of them or none. It
// answers the last of them, and where it refuses the transaction as a whole the first, which has the number of the last for that.
func (s *socket) transact() error {
	s.acknowledge()
	binary.NativeEndian.PutUint32(s.messages[8:], s.seq)
	last := s.seq
	s.beginNFT(unix.NFNL_MSG_BATCH_END, unix.AF_UNSPEC)
	s.end()
	s.seq = last // that message is never answered
	binary.BigEndian.PutUint16(s.messages[len(s.messages)-2:], unix.NFNL_SUBSYS_NFTABLES)
	return s.converse(func([]byte) {})
}

// generation returns the number of the last change of nftables.
func (s *socket) generation() (number uint32, err error) {
	s.beginNFT(nftMessage|unix.NFT_MSG_GETGEN, unix.AF_UNSPEC)
	err = s.exchange(func(message []byte) {
		for typ, v := range attributesOf(message) {
			if typ == unix.NFTA_GEN_ID && len(v) == 4 {
				number = binary.BigEndian.Uint32(v)
			}
		}
	})
	return number, err
}

// portRules returns the rules of portmap's table.
func (s *socket) portRules(family byte) (rules []portRule, err error) {
	s.begin(nftMessage|unix.NFT_MSG_GETRULE, unix.NLM_F_REQUEST|unix.NLM_F_DUMP)
	s.messages = append(s.messages, family, nl.NFNETLINK_V0, 0, 0)
	s.messages = appendString(s.messages, unix.NFTA_RULE_TABLE, portTable)
	err = s.exchange(func(message []byte) {
		var r portRule
		var table string
		for typ, v := range attributesOf(message) {
			switch typ {
			case unix.NFTA_RULE_TABLE:
				table = unix.ByteSliceToString(v)
			case unix.NFTA_RULE_CHAIN:
				r.chain = unix.ByteSliceToString(v)
			case unix.NFTA_RULE_HANDLE:
				r.handle = slices.Clone(v)
			case unix.NFTA_RULE_USERDATA:
				r.comment = commentOf(v)
			}
		}
		if table == portTable {
			rules = append(rules, r)
		}
	})
	return rules, err
}

// attributesOf yields the attributes of a message of nftables.
func attributesOf(message []byte) func(func(uint16, []byte) bool) {
	return nlattr.All(message[min(nl.SizeofNfgenmsg, len(message)):])
}

// commentOf returns the comment in what nft keeps with a rule: each of it is a type, of which 0 is a comment, a length, and a value.
func commentOf(userdata []byte) string {
	for len(userdata) >= 2 && 2+int(userdata[1]) <= len(userdata) {
		value := userdata[2 : 2+int(userdata[1])]
		if userdata[0] == 0 {
			return unix.ByteSliceToString(value)
		}
		userdata = userdata[2+len(value):]
	}
	return ""
}
