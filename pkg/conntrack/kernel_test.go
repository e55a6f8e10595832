package conntrack

import (
	"context"
	"encoding/binary"
	"errors"
	"net/netip"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nlattr"
	"github.com/warren-cni/warren/pkg/testnode"
)

// connection is an entry that a test makes.
type connection struct {
	protocol uint8
	// client sends to server, and backend answers. For ICMP the ports are the identifier and the type.
	client, server, backend string
	mark                    uint32
	zone                    uint16
}

// create makes the entry of a connection.
func create(tb testing.TB, s socket, c connection) {
	tb.Helper()
	client, server, backend := netip.MustParseAddrPort(c.client), netip.MustParseAddrPort(c.server), netip.MustParseAddrPort(c.backend)
	back := tuple(nl.CTA_TUPLE_REPLY, backend, client, c.protocol)
	if echo, ok := map[uint8]uint16{unix.IPPROTO_ICMP: 0, unix.IPPROTO_ICMPV6: 129}[c.protocol]; ok { // the answer has the same identifier
		back = tuple(nl.CTA_TUPLE_REPLY, netip.AddrPortFrom(backend.Addr(), client.Port()), netip.AddrPortFrom(client.Addr(), echo), c.protocol)
	}
	parts := []*nl.RtAttr{
		tuple(nl.CTA_TUPLE_ORIG, client, server, c.protocol), back,
		attribute(nl.CTA_TIMEOUT, nl.BEUint32Attr(1000)), attribute(nl.CTA_MARK, nl.BEUint32Attr(c.mark)),
	}
	if c.zone != 0 {
		parts = append(parts, attribute(nl.CTA_ZONE, nl.BEUint16Attr(c.zone)))
	}
	err := s.do(request(nl.IPCTNL_MSG_CT_NEW, unix.NLM_F_CREATE|unix.NLM_F_EXCL|unix.NLM_F_ACK, entry{flow: Flow{Src: client.Addr()}}.family(), parts), ignore)
	if err != nil {
		tb.Fatalf("making %+v: %v", c, err)
	}
}

// mustOpen opens a socket in the test's node.
func mustOpen(tb testing.TB) socket {
	tb.Helper()
	s, err := open()
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(s.close)
	return s
}

// table returns the marks of all connections.
func table(t *testing.T) map[string]uint32 {
	t.Helper()
	marks := map[string]uint32{}
	err := each([]walk{{}}, func(e entry) bool {
		marks[e.flow.String()] = e.mark
		return true
	})
	if err != nil {
		t.Fatal(err)
	}
	return marks
}

// involved are connections of 10.0.0.2 and fd00::2 of every kind, as client, as server and behind a Service; elsewhere are
// others.
func involved() []connection {
	return []connection{
		{unix.IPPROTO_TCP, "10.0.0.2:1000", "10.0.0.9:80", "10.0.0.9:80", 0x5, 0},
		{unix.IPPROTO_UDP, "10.0.0.8:1000", "10.0.0.2:53", "10.0.0.2:53", 0, 0},
		{unix.IPPROTO_SCTP, "10.0.0.8:1000", "10.96.0.1:90", "10.0.0.2:9090", 0, 0},
		{unix.IPPROTO_ICMP, "10.0.0.8:7", "10.0.0.2:8", "10.0.0.2:8", 0, 0},
		{unix.IPPROTO_UDP, "10.0.0.2:1001", "10.96.0.1:90", "10.0.0.9:9090", 0, 5},
		{unix.IPPROTO_TCP, "[fd00::8]:1000", "[fd00::2]:80", "[fd00::2]:80", 0, 0},
		{unix.IPPROTO_ICMPV6, "[fd00::2]:7", "[fd00::9]:128", "[fd00::9]:128", 0, 0},
	}
}

func elsewhere() []connection {
	return []connection{
		{unix.IPPROTO_TCP, "10.0.0.20:1000", "10.0.0.9:80", "10.0.0.9:80", 0, 0},
		{unix.IPPROTO_TCP, "10.0.0.8:1000", "10.0.0.20:80", "10.0.0.20:80", 0, 0},
		{unix.IPPROTO_UDP, "[fd00::20]:1000", "[fd00::9]:80", "[fd00::9]:80", 0, 0},
	}
}

func pod() []netip.Addr {
	return []netip.Addr{netip.MustParseAddr("10.0.0.2"), netip.MustParseAddr("fd00::2")}
}

// ways are both ways to find the connections of addresses, whatever the size of the table says.
func ways() map[string][]walk {
	walks := targeted(pod())
	return map[string][]walk{"targeted": walks, "all": {{among: walks[0].among}}}
}

func TestSweep(t *testing.T) {
	for name, walks := range ways() {
		t.Run(name, func(t *testing.T) {
			testnode.Enter(t)
			s := mustOpen(t)
			for _, c := range slices.Concat(involved(), elsewhere()) {
				create(t, s, c)
			}
			before := table(t)
			const bit = netfilter.CutMark
			want := map[string]uint32{
				"10.0.0.2 -> 10.0.0.9:80 (protocol 6)": 0x5 | bit, "10.0.0.8 -> 10.0.0.2:53 (protocol 17)": bit,
				"10.0.0.8 -> 10.0.0.2:9090 (protocol 132)": bit, "10.0.0.8 -> 10.0.0.2:0 (protocol 1)": bit,
				"10.0.0.2 -> 10.0.0.9:9090 (protocol 17)": bit, "fd00::8 -> [fd00::2]:80 (protocol 6)": bit, "fd00::2 -> [fd00::9]:0 (protocol 58)": bit,
				"10.0.0.20 -> 10.0.0.9:80 (protocol 6)": 0, "10.0.0.8 -> 10.0.0.20:80 (protocol 6)": 0, "fd00::20 -> [fd00::9]:80 (protocol 17)": 0,
			}
			none := func(Flow) bool { return false }
			all := func(Flow) bool { return true }
			n := len(involved())
			for _, step := range []struct {
				judge  func(Flow) bool
				counts Counts
				marks  map[string]uint32
			}{
				{all, Counts{Judged: n}, before},
				{none, Counts{Judged: n, Cut: n}, want},
				{none, Counts{Judged: n}, want},
				{all, Counts{Judged: n, Lifted: n}, before},
			} {
				counts, err := sweep(t.Context(), walks, step.judge)
				if err != nil || counts != step.counts {
					t.Errorf("%+v, %v; want %+v", counts, err, step.counts)
				}
				if diff := cmp.Diff(step.marks, table(t)); diff != "" {
					t.Errorf("marks (-want +got):\n%s", diff)
				}
			}
		})
	}
}

// A sweep changes nothing but the bit: not how long an entry lives without traffic.
func TestSweepKeepsTimeout(t *testing.T) {
	testnode.Enter(t)
	s := mustOpen(t)
	create(t, s, involved()[0])
	if _, err := Sweep(t.Context(), pod(), func(Flow) bool { return false }); err != nil {
		t.Fatal(err)
	}
	near := 0
	err := s.do(request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, unix.AF_INET, nil), func(m []byte) bool {
		for typ, v := range nlattr.All(m[nl.SizeofNfgenmsg:]) {
			if typ == nl.CTA_TIMEOUT {
				left := binary.BigEndian.Uint32(v)
				if 900 < left && left <= 1000 {
					near++
				}
			}
		}
		return true
	})
	if err != nil || near != 1 {
		t.Errorf("%d entries live near 1000 s, %v; want one", near, err)
	}
}

func TestSweepWithoutAddresses(t *testing.T) {
	testnode.Enter(t)
	create(t, mustOpen(t), involved()[0])
	judge := func(Flow) bool { return false }
	if counts, err := Sweep(t.Context(), nil, judge); counts != (Counts{}) || err != nil {
		t.Errorf("a sweep of no addresses: %+v, %v", counts, err)
	}
	if counts, err := SweepAll(t.Context(), judge); counts != (Counts{Judged: 1, Cut: 1}) || err != nil {
		t.Errorf("a sweep of all: %+v, %v", counts, err)
	}
}

// A connection between two of the addresses is judged once.
func TestSweepBothEnds(t *testing.T) {
	testnode.Enter(t)
	create(t, mustOpen(t), involved()[1])
	both := []netip.Addr{netip.MustParseAddr("10.0.0.8"), netip.MustParseAddr("10.0.0.2")}
	counts, err := sweep(t.Context(), targeted(both), func(Flow) bool { return false })
	if counts != (Counts{Judged: 1, Cut: 1}) || err != nil {
		t.Errorf("%+v, %v", counts, err)
	}
}

// What ends while it is judged is no error.
func TestSweepOfWhatEnds(t *testing.T) {
	testnode.Enter(t)
	create(t, mustOpen(t), involved()[0])
	counts, err := Sweep(t.Context(), pod(), func(Flow) bool {
		if forgetErr := Forget(pod()); forgetErr != nil {
			t.Error(forgetErr)
		}
		return false
	})
	if counts != (Counts{Judged: 1}) || err != nil {
		t.Errorf("%+v, %v", counts, err)
	}
}

func TestSweepStops(t *testing.T) {
	testnode.Enter(t)
	s := mustOpen(t)
	create(t, s, involved()[0])
	create(t, s, involved()[4])
	ctx, cancel := context.WithCancel(t.Context())
	counts, err := Sweep(ctx, pod(), func(Flow) bool {
		cancel()
		return false
	})
	if counts != (Counts{Judged: 1, Cut: 1}) || !errors.Is(err, context.Canceled) {
		t.Errorf("the context ended with the first: %+v, %v", counts, err)
	}
}

func TestForget(t *testing.T) {
	for name, forget := range map[string]func([]netip.Addr) error{
		"as is best":       Forget,
		"by the kernel":    func(as []netip.Addr) error { return forgetChosen(targeted(as)) },
		"one by one":       func(as []netip.Addr) error { return forgetFound(targeted(as)) },
		"in a walk of all": func(as []netip.Addr) error { return forgetFound([]walk{{among: targeted(as)[0].among}}) },
	} {
		t.Run(name, func(t *testing.T) {
			testnode.Enter(t)
			s := mustOpen(t)
			for _, c := range elsewhere() {
				create(t, s, c)
			}
			want := table(t)
			for _, c := range involved() {
				create(t, s, c)
			}
			for range 2 { // the second time there is nothing to do
				if err := forget(pod()); err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(want, table(t)); diff != "" {
					t.Errorf("connections that are left (-want +got):\n%s", diff)
				}
			}
		})
	}
}
