package wgdevice_test

import (
	"net/netip"
	"testing"

	"github.com/warren-cni/warren/pkg/internal/wire"
)

// What pods have in the lab.
var (
	pods4 = netip.MustParsePrefix("10.244.0.0/16")
	pods6 = netip.MustParsePrefix("fd00::/48")
)

// capture counts what passes the wire.
type capture struct {
	lab     *lab
	watch   wire.Watch
	running *wire.Capture
}

// listen starts a capture on the wire. Packets with the marker count as sent in clear.
func (l *lab) listen(t *testing.T, marker string) *capture {
	t.Helper()
	c := &capture{lab: l, watch: wire.Watch{Marker: []byte(marker), Pods: []netip.Prefix{pods4, pods6}, Port: wireGuardPort}}
	c.start(t)
	t.Cleanup(func() { _, _ = c.running.Stop() }) // what is not asked for does not matter
	return c
}

func (c *capture) start(t *testing.T) {
	t.Helper()
	c.running = in(t, c.lab.wire, func() (*wire.Capture, error) { return wire.Start("wire", c.watch) })
}

// count returns what was on the wire since the last count.
func (c *capture) count(t *testing.T) wire.Counts {
	t.Helper()
	counts, err := c.running.Stop()
	if err != nil {
		t.Fatal(err)
	}
	c.start(t)
	return counts
}

// inClear tells whether anything passed in clear.
func inClear(c wire.Counts) bool { return c.Marked > 0 || c.Pods > 0 }
