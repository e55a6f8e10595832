package firewall

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink/nl"

	"github.com/warren-cni/warren/pkg/netfilter"
)

func TestMemberRoundTrip(t *testing.T) {
	withPort := func(e netfilter.Entry, protocol string, port uint16) netfilter.Entry {
		e.Protocol, e.Port = protocol, port
		return e
	}
	for _, c := range []struct {
		typ   netfilter.SetType
		entry netfilter.Entry
	}{
		{netfilter.HashIP, addresses("10.0.0.1")[0]},
		{netfilter.HashIP, addresses("fd00::1")[0]},
		{netfilter.HashNet, addresses("10.0.0.0/8")[0]},
		{netfilter.HashNet, addresses("0.0.0.0/0")[0]},
		{netfilter.HashNet, addresses("fd00::/8")[0]},
		{netfilter.HashNet, addresses("fd00::1")[0]},
		{netfilter.HashIPPort, withPort(addresses("10.0.0.1")[0], "tcp", 80)},
		{netfilter.HashIPPort, withPort(addresses("fd00::1")[0], "udp", 65535)},
		{netfilter.HashIPPort, withPort(addresses("10.0.0.1")[0], "sctp", 1)},
		{netfilter.HashIPPort, withPort(addresses("10.0.0.1")[0], "47", 0)},
	} {
		b, err := appendMember(nil, c.typ, c.entry)
		if err != nil {
			t.Errorf("%s: %v", c.entry, err)
			continue
		}
		got, err := decodeMember(b)
		if err != nil || got != c.entry {
			t.Errorf("%s comes back as %s, error %v", c.entry, got, err)
		}
	}
}

// FuzzDecodeSet feeds anything as a message of the kernel: it may be refused, but must not panic.
func FuzzDecodeSet(f *testing.F) {
	member, err := appendMember(nil, netfilter.HashNet, addresses("10.0.0.0/8")[0])
	if err != nil {
		f.Fatal(err)
	}
	message := appendString(make([]byte, nl.SizeofNfgenmsg), nl.IPSET_ATTR_SETNAME, "WARREN-X")
	message = appendString(message, nl.IPSET_ATTR_TYPENAME, "hash:net")
	message = appendAttr(message, nl.IPSET_ATTR_FAMILY, []byte{2})
	message = appendAttr(message, nl.IPSET_ATTR_DATA|nested, appendUint32(nil, nl.IPSET_ATTR_MAXELEM, 7))
	message = appendAttr(message, nl.IPSET_ATTR_ADT|nested, appendAttr(nil, nl.IPSET_ATTR_DATA|nested, member))
	sets := map[string]*set{}
	if err := decodeSet(sets, message); err != nil {
		f.Fatal(err)
	}
	want := map[string]*set{"WARREN-X": {typ: netfilter.HashNet, family: netfilter.IPv4, max: 7, members: addresses("10.0.0.0/8")}}
	if diff := cmp.Diff(want, sets, cmp.AllowUnexported(set{}), cmpopts.EquateComparable(netfilter.Entry{})); diff != "" {
		f.Fatal(diff)
	}
	f.Add(message)
	f.Add(message[:len(message)-5])
	f.Fuzz(func(t *testing.T, message []byte) {
		sets := map[string]*set{}
		if err := decodeSet(sets, message); err != nil {
			return
		}
		for name := range sets {
			if !ours(name) {
				t.Errorf("took in the set %q of somebody else", name)
			}
		}
	})
}
