package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nlattr"
)

// ipsets is what this package asks of the kernel's sets.
type ipsets interface {
	// List returns the set of that name, or every set of ours when the name is empty. A set that is not there is not an error.
	List(name string) (map[string]*set, error)
	Create(name string, s set) error
	Destroy(name string) error
	// Swap exchanges the content of two sets of one type; rules that refer to one of them see the other's at once.
	Swap(a, b string) error
	// Add puts members in, in this order; those that are there already stay. It does all that can be done, and returns an error for
	// each list, or nil where there is none.
	Add(lists ...memberList) []error
	// Remove takes members out in the same way; those that are not there are no error.
	Remove(lists ...memberList) []error
}

// memberList are members that are to enter or leave a set.
type memberList struct {
	set     string
	typ     netfilter.SetType
	members []netfilter.Entry
}

// set is a set as the kernel holds it.
type set struct {
	typ    netfilter.SetType
	family netfilter.Family
	// max is how many members fit (ipset's maxelem, a bound that costs no memory).
	max int
	// members are sorted.
	members []netfilter.Entry
}

// The numbers of linux/netfilter/ipset that nl does not name.
const (
	setRevision = 1      // of every type in use; in every kernel since 3.14
	setFull     = 0x1100 // IPSET_ERR_HASH_FULL
)

// maxWaiting is how many bytes of messages wait until they are sent, and one more: if each of them is refused, the answers, of
// 1 kB or so each, must still fit into the socket's buffer.
const maxWaiting = 1 << 13

// kernelSets speaks the ipset protocol (linux/uapi/linux/netfilter/ipset/ip_set.h) over netlink. It encodes the messages itself,
// because netlink's own calls carry one member a message, have no way to write a prefix length of 0 and cannot list the sets of one
// owner.
type kernelSets struct{ *socket }

// List implements ipsets. Kernels before 6.9 break a listing off where what is first to be said of a set, which may be anybody's, takes more
// than 4 kB; they have more room once the socket has received something.
func (k kernelSets) List(name string) (map[string]*set, error) {
	sets, err := k.listOnce(name)
	if errors.Is(err, unix.EMSGSIZE) {
		sets, err = k.listOnce(name)
	}
	return sets, err
}

// listOnce is one attempt to list sets.
func (k kernelSets) listOnce(name string) (map[string]*set, error) {
	var payload []byte
	if name != "" {
		payload = appendString(nil, nl.IPSET_ATTR_SETNAME, name)
	}
	sets := map[string]*set{}
	var bad error
	err := k.ask(nl.IPSET_CMD_LIST, 0, payload, func(m []byte) {
		if bad == nil {
			bad = decodeSet(sets, m)
		}
	})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err = errors.Join(err, bad); err != nil {
		return nil, fmt.Errorf("listing sets: %w", err)
	}
	for _, s := range sets {
		// A set that grows while it is listed can show a member twice.
		s.members = netfilter.Entries(s.members)
	}
	return sets, nil
}

// Create implements ipsets.
func (k kernelSets) Create(name string, s set) error {
	family := byte(unix.AF_INET)
	if s.family == netfilter.IPv6 {
		family = unix.AF_INET6
	}
	b := appendString(nil, nl.IPSET_ATTR_SETNAME, name)
	b = appendString(b, nl.IPSET_ATTR_TYPENAME, string(s.typ))
	b = appendAttr(b, nl.IPSET_ATTR_REVISION, []byte{setRevision})
	b = appendAttr(b, nl.IPSET_ATTR_FAMILY, []byte{family})
	b = appendAttr(b, nl.IPSET_ATTR_DATA|nested,
		appendUint32(nil, nl.IPSET_ATTR_MAXELEM, uint32(s.max))) //nolint:gosec // a number of members
	if err := k.ask(nl.IPSET_CMD_CREATE, unix.NLM_F_EXCL, b, ignore); err != nil {
		return fmt.Errorf("creating set %s (%s): %w", name, s.typ, err)
	}
	return nil
}

// Destroy implements ipsets. A set that is gone already is no error.
func (k kernelSets) Destroy(name string) error {
	err := k.ask(nl.IPSET_CMD_DESTROY, 0, appendString(nil, nl.IPSET_ATTR_SETNAME, name), ignore)
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("destroying set %s: %w", name, err)
	}
	return nil
}

// Swap implements ipsets.
func (k kernelSets) Swap(a, b string) error {
	names := appendString(appendString(nil, nl.IPSET_ATTR_SETNAME, a), nl.IPSET_ATTR_SETNAME2, b)
	if err := k.ask(nl.IPSET_CMD_SWAP, 0, names, ignore); err != nil {
		return fmt.Errorf("swapping sets %s and %s: %w", a, b, err)
	}
	return nil
}

// Add implements ipsets.
func (k kernelSets) Add(lists ...memberList) []error {
	return k.update(nl.IPSET_CMD_ADD, "adding to", lists)
}

// Remove implements ipsets.
func (k kernelSets) Remove(lists ...memberList) []error {
	return k.update(nl.IPSET_CMD_DEL, "removing from", lists)
}

// update adds or deletes members. Where something is refused, doing it again list by list finds what, and does the rest: what is
// already as wanted is no error without NLM_F_EXCL.
func (k kernelSets) update(cmd int, doing string, lists []memberList) []error {
	if k.send(cmd, lists...) == nil {
		return nil
	}
	errs := make([]error, len(lists))
	for i, l := range lists {
		if err := k.one(cmd, l); err != nil {
			errs[i] = fmt.Errorf("%s set %s: %w", doing, l.set, err)
		}
	}
	return errs
}

// one adds or deletes the members of one list; where that is refused, one by one, because the kernel stops at the first that it
// refuses.
func (k kernelSets) one(cmd int, l memberList) error {
	if k.send(cmd, l) == nil {
		return nil
	}
	var errs []error
	for i, e := range l.members {
		if err := k.send(cmd, memberList{l.set, l.typ, l.members[i : i+1]}); err != nil {
			errs = append(errs, fmt.Errorf("member %s: %w", e, err))
		}
	}
	return errors.Join(errs...)
}

// send adds or deletes members: many in one message, many messages together. It ends at the first failure.
func (k kernelSets) send(cmd int, lists ...memberList) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := range lists {
		l := &lists[i]
		for at := 0; at < len(l.members); at += maxMembers {
			if len(k.messages) >= maxWaiting {
				if err := k.exchange(ignore); err != nil {
					return translate(err)
				}
			}
			k.begin(cmd, 0)
			if err := k.appendMembers(l.set, l.typ, l.members[at:min(at+maxMembers, len(l.members))]); err != nil {
				k.discard()
				return err
			}
		}
	}
	return translate(k.exchange(ignore))
}

// begin starts a message of the ipset protocol.
func (k kernelSets) begin(cmd, flags int) {
	k.socket.begin(cmd|unix.NFNL_SUBSYS_IPSET<<8, nl.GetIpsetFlags(cmd)&^unix.NLM_F_ACK|flags)
	k.messages = append(k.messages, unix.AF_UNSPEC, nl.NFNETLINK_V0, 0, 0) // struct nfgenmsg
	k.messages = appendAttr(k.messages, nl.IPSET_ATTR_PROTOCOL, []byte{nl.IPSET_PROTOCOL})
}

// appendMembers completes the message that adds or deletes members.
func (s *socket) appendMembers(set string, typ netfilter.SetType, members []netfilter.Entry) error {
	b := appendString(s.messages, nl.IPSET_ATTR_SETNAME, set)
	// The kernel accepts a list of members only with a line number to report the failing one in.
	b = appendUint32(b, nl.IPSET_ATTR_LINENO, 0)
	b, list := openAttr(b, nl.IPSET_ATTR_ADT|nested)
	for _, e := range members {
		var data int
		var err error
		b, data = openAttr(b, nl.IPSET_ATTR_DATA|nested)
		if b, err = appendMember(b, typ, e); err != nil {
			return err
		}
		b = closeAttr(b, data)
	}
	s.messages = closeAttr(b, list)
	return nil
}

// ask sends one message and hands over the answers.
func (k kernelSets) ask(cmd, flags int, payload []byte, handle func([]byte)) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.begin(cmd, flags)
	k.messages = append(k.messages, payload...)
	return translate(k.exchange(handle))
}

// translate returns an error of ipset's own as an nl.IPSetError; others stay.
func translate(err error) error {
	if err == nil {
		return nil
	}
	errno, ok := errors.AsType[syscall.Errno](err)
	if !ok || errno < nl.IPSET_ERR_PRIVATE {
		return err
	}
	if errno == setFull {
		return errors.New("the set is full")
	}
	return nl.IPSetError(errno)
}

// ignore is for answers that say nothing but that all is well.
func ignore([]byte) {}

// decodeSet adds what one message of a listing says to the sets: a large set comes in several messages, of which only the first
// has the type. Sets of others are left out.
func decodeSet(sets map[string]*set, message []byte) error {
	if len(message) < nl.SizeofNfgenmsg {
		return fmt.Errorf("listing sets: message of %d bytes", len(message))
	}
	var s *set
	for typ, v := range nlattr.All(message[nl.SizeofNfgenmsg:]) {
		if typ == nl.IPSET_ATTR_SETNAME {
			name := unix.ByteSliceToString(v)
			if !strings.HasPrefix(name, netfilter.Prefix) {
				return nil
			}
			if s = sets[name]; s == nil {
				s = &set{}
				sets[name] = s
			}
		}
		// The name stands ahead of everything that belongs to it.
		if s == nil {
			continue
		}
		switch typ {
		case nl.IPSET_ATTR_TYPENAME:
			s.typ = netfilter.SetType(unix.ByteSliceToString(v))
		case nl.IPSET_ATTR_FAMILY:
			s.family = netfilter.IPv4
			if v[0] == unix.AF_INET6 {
				s.family = netfilter.IPv6
			}
		case nl.IPSET_ATTR_DATA:
			s.max = decodeMax(v)
		case nl.IPSET_ATTR_ADT:
			for _, data := range nlattr.All(v) {
				e, err := decodeMember(data)
				if err != nil {
					return err
				}
				s.members = append(s.members, e)
			}
		}
	}
	return nil
}

// decodeMax returns the maxelem of a set's header.
func decodeMax(header []byte) int {
	for typ, v := range nlattr.All(header) {
		if typ == nl.IPSET_ATTR_MAXELEM && len(v) == 4 {
			return int(binary.BigEndian.Uint32(v))
		}
	}
	return 0
}
