// Package conntrack ends established connections: those that policies no longer allow, and all of an address that is given up.
//
// What is established passes without a look at the policies (pkg/guard), so that a policy which changes has to be held against
// the kernel's table of connections once. A connection is cut by a bit in its mark, netfilter.CutMark, on which pkg/guard drops
// its packets in both directions. To delete its entry would not do: the next packet of the other side opens it again, the
// other way round. The marked entry lives on for as long as somebody sends, and the bit is cleared when the connection is
// allowed again. No other bit, no timeout and no other connection is touched.
//
// Everything happens in the network namespace of the calling thread.
package conntrack

import (
	"context"
	"errors"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// Flow is a connection as the FORWARD hook sees its first packet: from the source before, to the destination after any translation.
type Flow struct {
	Src, Dst netip.Addr
	// Protocol is the number of the transport protocol.
	Protocol uint8
	// Port is the destination port; zero where the protocol has none.
	Port uint16
}

// Counts says what a sweep did.
type Counts struct {
	// Judged are the connections that were looked at, Cut those that were marked, Lifted those whose mark was cleared.
	Judged, Cut, Lifted int
}

// Sweep judges the established connections from and to the addresses: those that are not allowed are cut, those that were cut
// and are allowed again go on. What it cannot change, but for connections that have ended meanwhile, is in the error, and the
// rest is done nevertheless. The judge is called in the calling goroutine only.
func Sweep(ctx context.Context, addresses []netip.Addr, allowed func(Flow) bool) (Counts, error) {
	if len(addresses) == 0 {
		return Counts{}, nil
	}
	entries, err := size()
	if err != nil {
		return Counts{}, err
	}
	return sweep(ctx, plan(addresses, entries), allowed)
}

// SweepAll is Sweep for all connections.
func SweepAll(ctx context.Context, allowed func(Flow) bool) (Counts, error) {
	return sweep(ctx, []walk{{}}, allowed)
}

// sweep judges what the walks find.
func sweep(ctx context.Context, walks []walk, allowed func(Flow) bool) (Counts, error) {
	s, err := open()
	if err != nil {
		return Counts{}, err
	}
	defer s.close()
	var counts Counts
	var errs []error
	err = each(walks, func(e entry) bool {
		counts.Judged++
		cut := !allowed(e.flow)
		if cut == (e.mark&netfilter.CutMark != 0) {
			return ctx.Err() == nil
		}
		switch changeErr := s.mark(e, cut); {
		case errors.Is(changeErr, unix.ENOENT): // it has ended
		case changeErr != nil:
			errs = append(errs, fmt.Errorf("marking the connection %s: %w", e.flow, changeErr))
		case cut:
			counts.Cut++
		default:
			counts.Lifted++
		}
		return ctx.Err() == nil
	})
	return counts, errors.Join(append(errs, err, ctx.Err())...)
}

// String names the flow in messages.
func (f Flow) String() string {
	return fmt.Sprintf("%s -> %s (protocol %d)", f.Src, netip.AddrPortFrom(f.Dst, f.Port), f.Protocol)
}
