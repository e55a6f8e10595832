package firewall

import (
	"runtime"
	"slices"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/netfilter"
)

func TestDriftIsSeen(t *testing.T) {
	both := func(format string) []string {
		return []string{strings.ReplaceAll(format, "FAMILY", "ipv4"), strings.ReplaceAll(format, "FAMILY", "ipv6")}
	}
	drifts := map[string]struct {
		drift func(n *node)
		want  []string
	}{
		"nothing": {func(*node) {}, nil},
		"rule ahead": {
			func(n *node) { n.iptables("-t mangle -I FORWARD -i eth7 -j ACCEPT") },
			both("chain FORWARD in mangle table (FAMILY) has a rule ahead of WARREN-FORWARD: -i eth7 -j ACCEPT"),
		},
		"jump deleted": {
			func(n *node) { n.iptables("-t mangle -D FORWARD -m comment --comment warren -j WARREN-FORWARD") },
			both("chain FORWARD in mangle table (FAMILY) does not lead to: WARREN-FORWARD"),
		},
		"hook left over": {
			func(n *node) { n.iptables("-t mangle -A INPUT -m comment --comment warren -j WARREN-POLICY") },
			both("chain INPUT in mangle table (FAMILY) leads to a chain that it should not lead to: WARREN-POLICY"),
		},
		"chain flushed": {
			func(n *node) { n.iptables("-t mangle -F WARREN-POLICY") },
			both("chain WARREN-POLICY in mangle table (FAMILY) has other rules"),
		},
		"table gone": {
			func(n *node) {
				n.run("iptables-" + n.backend + " -t raw -F")
				n.run("iptables-" + n.backend + " -t raw -X")
			},
			[]string{
				"chain WARREN-SOURCE in raw table (ipv4) is missing",
				"chain PREROUTING in raw table (ipv4) does not lead to: WARREN-SOURCE",
			},
		},
		"members": {
			func(n *node) {
				n.run("ipset flush " + peers(netfilter.IPv4))
				n.run("ipset add " + netfilter.ReadySet(netfilter.IPv6) + " fd00::77")
			},
			[]string{
				"set " + peers(netfilter.IPv4) + " lacks members: 0.0.0.0/1, 10.2.0.0/16, 10.9.9.9",
				"set " + netfilter.ReadySet(netfilter.IPv6) + " has members that it should not have: fd00::77",
			},
		},
	}
	onEach(t, func(n *node) {
		t := n.t
		for name, c := range drifts {
			w := n.firewall()
			n.iptables("-t mangle -F FORWARD") // a rule ahead is not ours to remove
			n.apply(w, sample())
			c.drift(n)
			before := n.state()
			if diff := cmp.Diff(c.want, n.drift(w, sample())); diff != "" {
				t.Errorf("%s (-want +got):\n%s", name, diff)
			}
			if diff := cmp.Diff(before, n.state()); diff != "" {
				t.Errorf("%s: looking changed the kernel:\n%s", name, diff)
			}
		}
	})
}

// Sets that are gone or of another type, sets that lack much, chains that stand closed.
func TestDriftOfSetsAndClosedChains(t *testing.T) {
	n := newNode(t, nft)
	n.run("ipset create " + peers(netfilter.IPv4) + " hash:net,port")
	many := sample()
	setIn(&many.V4, peers(netfilter.IPv4)).Entries = addresses("10.1.0.1", "10.1.0.2", "10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6", "10.1.0.7")
	w := n.firewall()
	got := strings.Join(n.drift(w, many), "\n")
	for _, want := range []string{
		"set " + peers(netfilter.IPv4) + " has another type: hash:net,port (ipv4)",
		"set " + ports(netfilter.IPv6) + " is missing",
		"chain WARREN-POLICY in mangle table (ipv6) is missing",
	} {
		if !strings.Contains(got, want) {
			t.Errorf("the drift does not say %q:\n%s", want, got)
		}
	}
	n.run("ipset destroy " + peers(netfilter.IPv4))
	n.apply(w, sample())
	want := "lacks members: 10.1.0.1, 10.1.0.2, 10.1.0.3, 10.1.0.4, 10.1.0.5, and 2 more"
	if got := strings.Join(n.drift(w, many), "\n"); !strings.Contains(got, want) {
		t.Errorf("the drift does not say %q:\n%s", want, got)
	}
	closing := sample()
	chain := chainIn(&closing.V6, "WARREN-POLICY")
	chain.Closable = []string{"shop/api", "shop/db"}
	stands := closing
	stands.V6.Chains = slices.Clone(closing.V6.Chains)
	*chainIn(&stands.V6, "WARREN-POLICY") = chain.Closed()
	n.apply(w, stands)
	closed := []string{"chain WARREN-POLICY in mangle table (ipv6) is closed, because its rules were refused: shop/api, shop/db"}
	if diff := cmp.Diff(closed, n.drift(w, closing)); diff != "" {
		t.Errorf("a closed chain (-want +got):\n%s", diff)
	}
}

// One goroutine asks while another applies, as an operator does.
func TestDriftBesideApply(t *testing.T) {
	n := newNode(t, nft)
	w := n.firewall()
	n.apply(w, sample())
	here, err := ns.GetCurrentNS()
	if err != nil {
		t.Fatal(err)
	}
	asked := make(chan error)
	go func() {
		runtime.LockOSThread() // and never unlocked, so that the thread ends with the goroutine
		err := here.Set()
		for range 10 {
			if err == nil {
				_, err = w.Drift(t.Context(), sample())
			}
			if err == nil {
				_, err = w.Denied(t.Context())
			}
		}
		asked <- err
	}()
	for _, r := range []netfilter.Ruleset{without(), sample(), without(), sample()} {
		n.apply(w, r)
	}
	if err := <-asked; err != nil {
		t.Error(err)
	}
	if got := n.drift(w, sample()); len(got) > 0 {
		t.Errorf("in the end there is %q", got)
	}
}

// drift returns the differences as text.
func (n *node) drift(w *Firewall, r netfilter.Ruleset) []string {
	n.t.Helper()
	differences, err := w.Drift(n.t.Context(), r)
	if err != nil {
		n.t.Fatal(err)
	}
	var lines []string
	for _, d := range differences {
		lines = append(lines, d.String())
	}
	return lines
}
