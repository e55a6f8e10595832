package firewall

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// ipsets is what this package asks of the kernel's sets.
type ipsets interface {
	// List returns the set of that name, or every set of ours when the name is empty. A set that is not there is not an error.
	List(name string) (map[string]*set, error)
	Create(name string, s set) error
	Destroy(name string) error
	// Swap exchanges the content of two sets of one type; rules that refer to one of them see the other's at once.
	Swap(a, b string) error
	// Add puts members in; those that are there already stay.
	Add(name string, typ netfilter.SetType, members []netfilter.Entry) error
	// Remove takes members out; those that are not there are no error.
	Remove(name string, typ netfilter.SetType, members []netfilter.Entry) error
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

// kernelSets speaks the ipset protocol (linux/uapi/linux/netfilter/ipset/ip_set.h) over netlink. It encodes the messages itself, because netlink's own calls carry one member a message, have no way
// to write a prefix length of 0 and cannot list the sets of one owner.
type kernelSets struct{ *socket }

// List implements ipsets.
func (k kernelSets) List(name string) (map[string]*set, error) {
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
func (k kernelSets) Add(name string, typ netfilter.SetType, members []netfilter.Entry) error {
	if err := k.update(nl.IPSET_CMD_ADD, name, typ, members); err != nil {
		return fmt.Errorf("adding to set %s: %w", name, err)
	}
	return nil
}

// Remove implements ipsets.
func (k kernelSets) Remove(name string, typ netfilter.SetType, members []netfilter.Entry) error {
	if err := k.update(nl.IPSET_CMD_DEL, name, typ, members); err != nil {
		return fmt.Errorf("removing from set %s: %w", name, err)
	}
	return nil
}

// update adds or deletes members, many in one message. Without NLM_F_EXCL what is already as wanted is no error.
func (k kernelSets) update(cmd int, name string, typ netfilter.SetType, members []netfilter.Entry) error {
	for batch := range slices.Chunk(members, maxBatch) {
		err := k.updateBatch(cmd, name, typ, batch)
		if err == nil {
			continue
		}
		if len(batch) == 1 {
			return fmt.Errorf("member %s: %w", batch[0], err)
		}
		// The kernel stops at the first that it refuses. One by one finds it, and puts the rest in.
		var errs []error
		for i := range batch {
			errs = append(errs, k.update(cmd, name, typ, batch[i:i+1]))
		}
		if err := errors.Join(errs...); err != nil {
			return err
		}
	}
	return nil
}

// updateBatch sends one message of members.
func (k kernelSets) updateBatch(cmd int, name string, typ netfilter.SetType, members []netfilter.Entry) error {
	b, err := membersMessage(name, typ, members)
	if err != nil {
		return err
	}
	return k.ask(cmd, 0, b, ignore)
}

// membersMessage is the message that adds or deletes members.
func membersMessage(name string, typ netfilter.SetType, members []netfilter.Entry) ([]byte, error) {
	var all []byte
	for _, e := range members {
		data, err := encodeMember(typ, e)
		if err != nil {
			return nil, err
		}
		all = appendAttr(all, nl.IPSET_ATTR_DATA|nested, data)
	}
	b := appendString(nil, nl.IPSET_ATTR_SETNAME, name)
	// The kernel accepts a list of members only with a line number to report the failing one in.
	b = appendUint32(b, nl.IPSET_ATTR_LINENO, 0)
	return appendAttr(b, nl.IPSET_ATTR_ADT|nested, all), nil
}

// ask sends one message and hands over the answers. Errors of ipset's own are nl.IPSetError, others syscall.Errno.
func (k kernelSets) ask(cmd, flags int, payload []byte, handle func([]byte)) error {
	b := (&nl.Nfgenmsg{Version: nl.NFNETLINK_V0}).Serialize()
	b = append(appendAttr(b, nl.IPSET_ATTR_PROTOCOL, []byte{nl.IPSET_PROTOCOL}), payload...)
	err := k.request(cmd|unix.NFNL_SUBSYS_IPSET<<8, nl.GetIpsetFlags(cmd)|flags, b, handle)
	var errno syscall.Errno
	if !errors.As(err, &errno) || errno < nl.IPSET_ERR_PRIVATE {
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
	for typ, v := range attributes(message[nl.SizeofNfgenmsg:]) {
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
			for _, data := range attributes(v) {
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
	for typ, v := range attributes(header) {
		if typ == nl.IPSET_ATTR_MAXELEM && len(v) == 4 {
			return int(binary.BigEndian.Uint32(v))
		}
	}
	return 0
}
