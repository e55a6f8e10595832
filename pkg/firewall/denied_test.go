package firewall

import (
	"net"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// Totals grow by what a counter grew, and by all of it where it began again.
func TestDenialsOnlyGrow(t *testing.T) {
	denial := func(chain string, packets uint64) Denial {
		return Denial{Family: netfilter.IPv4, Table: "mangle", Chain: chain, Packets: packets, Bytes: 100 * packets}
	}
	var d denials
	for i, step := range []struct{ read, want []Denial }{
		{[]Denial{denial("A", 5), denial("B", 1)}, []Denial{denial("A", 5), denial("B", 1)}},
		{[]Denial{denial("A", 7), denial("B", 1)}, []Denial{denial("A", 7), denial("B", 1)}},
		{[]Denial{denial("A", 2), denial("B", 0)}, []Denial{denial("A", 9), denial("B", 1)}}, // both written anew
		{[]Denial{denial("A", 3), denial("B", 4)}, []Denial{denial("A", 10), denial("B", 5)}},
		{[]Denial{denial("B", 4)}, []Denial{denial("B", 5)}},                                                 // A is gone
		{[]Denial{denial("A", 2), denial("A", 1), denial("B", 4)}, []Denial{denial("A", 3), denial("B", 5)}}, // two rules alike
	} {
		if diff := cmp.Diff(step.want, d.add(step.read)); diff != "" {
			t.Errorf("reading %d (-want +got):\n%s", i, diff)
		}
	}
}

// TestDeniedCountsPackets drops packets on a node's loopback device by a rule of each table, with rewrites in between.
func TestDeniedCountsPackets(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		n.run("ip link set lo up")
		plan := func(other, reason string) netfilter.Ruleset {
			return netfilter.Ruleset{V4: netfilter.Rules{
				Chains: []netfilter.Chain{
					{Table: "mangle", Name: "WARREN-I-A", Rules: []netfilter.Rule{
						rule(InClear+"to a node", "-p udp --dport 7"), rule(other, "-p udp --dport 7 -j RETURN"), rule(reason, "-p udp --dport 9 -j DROP"),
					}},
					{Table: "raw", Name: "WARREN-RAW", Rules: []netfilter.Rule{rule("loopback", "-p udp --dport 11 -j DROP")}},
				},
				Hooks: []netfilter.Hook{
					{Table: "mangle", BuiltIn: "PREROUTING", Chain: "WARREN-I-A"},
					{Table: "raw", BuiltIn: "PREROUTING", Chain: "WARREN-RAW"},
				},
			}}
		}
		denial := func(table, chain, comment string, packets uint64) Denial {
			return Denial{Family: netfilter.IPv4, Table: table, Chain: chain, Comment: comment, Packets: packets, Bytes: packets * 33}
		}
		w := n.firewall()
		now := time.Unix(0, 0)
		w.now = func() time.Time { return now }
		expect := func(want ...Denial) {
			t.Helper()
			got, err := w.Denied(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("what was dropped (-want +got):\n%s", diff)
			}
		}
		inClear := func(packets uint64) Denial { return denial("mangle", "WARREN-I-A", InClear+"to a node", packets) }
		n.apply(w, plan("not counted", "shop/api, shop/db"))
		expect(denial("raw", "WARREN-RAW", "loopback", 0), inClear(0), denial("mangle", "WARREN-I-A", "shop/api, shop/db", 0))
		knock(t, 9, 9, 11, 7, 7)
		now = now.Add(denialsLast - 1)
		expect(denial("raw", "WARREN-RAW", "loopback", 0), inClear(0), denial("mangle", "WARREN-I-A", "shop/api, shop/db", 0)) // as before
		now = now.Add(1)
		expect(denial("raw", "WARREN-RAW", "loopback", 1), inClear(2), denial("mangle", "WARREN-I-A", "shop/api, shop/db", 2))
		n.apply(w, plan("the rule before changed", "shop/api, shop/db"))
		knock(t, 9)
		now = now.Add(denialsLast)
		expect(denial("raw", "WARREN-RAW", "loopback", 1), inClear(2), denial("mangle", "WARREN-I-A", "shop/api, shop/db", 3))
		n.apply(w, plan("the rule before changed", "shop/api"))
		knock(t, 9)
		now = now.Add(denialsLast)
		expect(denial("raw", "WARREN-RAW", "loopback", 1), inClear(2), denial("mangle", "WARREN-I-A", "shop/api", 1))
	})
}

// knock sends datagrams of 33 bytes to ports of the loopback address. They have met the rules when it returns.
func knock(tb testing.TB, ports ...int) {
	tb.Helper()
	for _, port := range ports {
		// Each from a socket of its own: the ICMP error for one would be told to the next.
		conn, err := net.DialUDP("udp4", nil, &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
		if err != nil {
			tb.Fatal(err)
		}
		if _, err := conn.Write([]byte("knock")); err != nil {
			tb.Fatal(err)
		}
		if err := conn.Close(); err != nil {
			tb.Fatal(err)
		}
	}
}
