package capture

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/testnode"
)

// addVeth makes a link of the node, whose other end is that of the wire with the same name.
func addVeth(t *testing.T, node, wire ns.NetNS, name string) {
	t.Helper()
	err := node.Do(func(ns.NetNS) error {
		attrs := netlink.NewLinkAttrs()
		attrs.Name = name
		veth := &netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerNamespace: netlink.NsFd(int(wire.Fd()))}
		return errors.Join(netlink.LinkAdd(veth), netlink.LinkSetUp(veth))
	})
	if err == nil {
		err = wire.Do(func(ns.NetNS) error {
			end, err := netlinksafe.LinkByName(name)
			if err != nil {
				return err
			}
			return netlink.LinkSetUp(end)
		})
	}
	if err != nil {
		t.Fatal(err)
	}
}

// carrying waits until a link of the node takes packets: for a moment after it is up it drops what it gets.
func carrying(t *testing.T, node, wire ns.NetNS, name string) {
	t.Helper()
	const pilot = "not the marker of any test"
	for range 100 {
		c := started(t, node, Watch{Marker: []byte(pilot)})
		send(t, node, name, of(0x88b5, pilot))
		send(t, wire, name, of(0x88b5, pilot))
		if on(stopped(t, c), name).Marked == (Traffic{Sent: 1, Received: 1}) {
			return
		}
	}
	t.Fatalf("%s carries nothing", name)
}

// send sends a frame by a link of a namespace.
func send(t *testing.T, from ns.NetNS, link string, frame []byte) {
	t.Helper()
	err := from.Do(func(ns.NetNS) error {
		found, err := net.InterfaceByName(link)
		if err != nil {
			return err
		}
		fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		to := &unix.SockaddrLinklayer{Ifindex: found.Index, Protocol: networkOrder(uint16(frame[12])<<8 | uint16(frame[13]))}
		return errors.Join(unix.Sendto(fd, frame, 0, to), unix.Close(fd))
	})
	if err != nil {
		t.Fatal(err)
	}
}

// started begins a capture on a node.
func started(t *testing.T, node ns.NetNS, w Watch) *Capture {
	t.Helper()
	var c *Capture
	err := node.Do(func(ns.NetNS) (err error) {
		c, err = Start(w)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// stopped ends a capture and returns what it saw.
func stopped(t *testing.T, c *Capture) Report {
	t.Helper()
	report, err := c.Stop()
	if err != nil {
		t.Fatal(err)
	}
	if report.Dropped > 0 || report.Unjudged > 0 {
		t.Errorf("%d dropped, %d not judged", report.Dropped, report.Unjudged)
	}
	return report
}

// on returns what a report has of a link.
func on(report Report, name string) Link {
	for _, l := range report.Links {
		if l.Name == name {
			return l
		}
	}
	return Link{}
}

// The kernel's filter and the socket make of each frame what the judge makes of it, both ways; with more prefixes than the filter
// takes, too.
func TestCaptureCountsFrames(t *testing.T) {
	many := watch()
	for i := range maxPrefixes {
		many.Pods = append(many.Pods, netip.MustParsePrefix(fmt.Sprintf("10.245.%d.0/24", i)))
	}
	for name, w := range map[string]Watch{"few prefixes": watch(), "many": many} {
		t.Run(name, func(t *testing.T) {
			node, wire := testnode.New(t), testnode.New(t)
			addVeth(t, node, wire, "uplink")
			carrying(t, node, wire, "uplink")
			c, j, want := started(t, node, w), newJudge(w), Link{Name: "uplink"}
			for _, f := range frames() {
				for _, sent := range []bool{true, false} {
					if j.add(&want, f.frame, true, sent); sent {
						send(t, node, "uplink", f.frame)
					} else {
						send(t, wire, "uplink", f.frame)
					}
				}
			}
			report := stopped(t, c)
			if diff := cmp.Diff(want, on(report, "uplink"), cmpopts.IgnoreFields(Link{}, "Examples")); diff != "" || want.Clear.Sent < 10 || want.Clear.Received < 10 {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if diff := cmp.Diff(j.remotes, report.Remotes, cmpopts.EquateComparable(netip.AddrPort{})); diff != "" {
				t.Errorf("remotes (-want +got):\n%s", diff)
			}
		})
	}
}

// Links inside the node are left out, those that were there and those that come; uplinks that come are not.
func TestCaptureChoosesLinks(t *testing.T) {
	node, wire := testnode.New(t), testnode.New(t)
	addVeth(t, node, wire, "uplink")
	carrying(t, node, wire, "uplink")
	addVeth(t, node, wire, "wrn0")
	addVeth(t, node, wire, "warren0")
	c := started(t, node, watch())
	addVeth(t, node, wire, "second")
	carrying(t, node, wire, "second")
	addVeth(t, node, wire, "wrn1")
	frame := ethernet(ip(pod4, far4, unix.IPPROTO_TCP, "x"))
	for _, link := range []string{"uplink", "wrn0", "warren0", "second", "wrn1"} {
		send(t, node, link, frame)
		send(t, wire, link, frame)
	}
	var got []string
	for _, l := range stopped(t, c).Links {
		got = append(got, fmt.Sprint(l.Name, " ", l.Clear))
	}
	if diff := cmp.Diff([]string{"second {1 1}", "uplink {1 1}"}, got); diff != "" {
		t.Errorf("links (-want +got):\n%s", diff)
	}
}

// Packets that find no room are told of.
func TestCaptureTellsOfDrops(t *testing.T) {
	node, wire := testnode.New(t), testnode.New(t)
	addVeth(t, node, wire, "uplink")
	carrying(t, node, wire, "uplink")
	var c *Capture
	err := node.Do(func(ns.NetNS) error {
		handle, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		c = &Capture{links: newLinks(handle), judge: newJudge(watch()), frame: make([]byte, snap)} // nobody reads yet
		return c.open(watch())
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.socket.Close() })
	raw, err := c.socket.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	err = raw.Control(func(fd uintptr) {
		if sizeErr := unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4096); sizeErr != nil {
			t.Error(sizeErr)
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	const sent = 100
	for range sent {
		send(t, node, "uplink", ethernet(ip(pod4, far4, unix.IPPROTO_TCP, "x")))
	}
	if err := c.finish(); err != nil {
		t.Fatal(err)
	}
	counted := 0
	for _, l := range c.links.seen {
		if l != nil {
			counted += l.Clear.Total()
		}
	}
	if counted == 0 || counted == sent || counted+c.report.Dropped < sent { // the link itself may have sent something, too
		t.Errorf("%d counted, %d dropped of %d", counted, c.report.Dropped, sent)
	}
}

func TestStartWantsAMarker(t *testing.T) {
	if _, err := Start(Watch{Marker: []byte("short")}); err == nil || !strings.Contains(err.Error(), "marker") {
		t.Errorf("error %v", err)
	}
}
