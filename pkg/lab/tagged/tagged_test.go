package tagged

import (
	"bytes"
	"net/netip"
	"testing"
	"time"
)

// Every kind of packet is recognised as what it was sent as, and an answer to it is not.
func TestPacketsAreRecognised(t *testing.T) {
	for _, ends := range [][2]string{{"10.0.0.1", "10.0.0.2"}, {"fd00::1", "fd00::2"}} {
		for _, protocol := range Protocols() {
			shot := Shot{Tag: 77, Protocol: protocol, Src: netip.MustParseAddr(ends[0]), Dst: netip.MustParseAddr(ends[1]), Port: 80}
			packet := shot.Packet(5)
			want := Arrival{Tag: 77, Protocol: protocol, Src: shot.Src, Dst: shot.Dst}
			if got, ok := parse(packet); !ok || got != want {
				t.Errorf("%+v is taken for %+v, %v", shot, got, ok)
			}
			if _, ok := parse(packet[:len(packet)-1]); ok {
				t.Errorf("%+v without its end is taken for a whole one", shot)
			}
			if protocol == ICMP {
				packet[len(packet)-tagSize-8] ^= 8 // 8 to 0, 128 to 136
				if _, ok := parse(packet); ok {
					t.Errorf("an answer to %+v counts", shot)
				}
			}
		}
	}
}

// A payload changes nothing of how a packet is counted, and what belongs to no connection counts nowhere if it is an answer.
func TestPayloadAndStray(t *testing.T) {
	payload := []byte("0123456789abcdef")
	for _, protocol := range Protocols() {
		shot := Shot{
			Tag: 7, Protocol: protocol, Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2"), Port: 80, Payload: payload,
		}
		if _, ok := parse(shot.Packet(5)); !ok || !bytes.HasSuffix(shot.Packet(5), payload) {
			t.Errorf("%s with a payload: %x", protocol, shot.Packet(5))
		}
		shot.Stray = true
		if _, ok := parse(shot.Packet(5)); ok && protocol == ICMP {
			t.Errorf("a lone answer counts: %x", shot.Packet(5))
		}
	}
}

func TestCounting(t *testing.T) {
	c := &Counter{count: map[Arrival]*tally{}}
	for i, ms := range []int64{0, 10, 50, 60} {
		c.add(Arrival{Tag: uint32(i / 3), Protocol: UDP}, time.UnixMilli(ms))
	}
	if all, first := c.Packets(nil), c.Packets(Of(0)); all != 4 || first != 3 {
		t.Errorf("%d packets, %d of the first tag", all, first)
	}
	if gap := c.Gap(Of(0)); gap != 40*time.Millisecond {
		t.Errorf("the longest gap is %v", gap)
	}
	if kinds := c.Kinds(nil); kinds != 2 {
		t.Errorf("%d kinds", kinds)
	}
}
