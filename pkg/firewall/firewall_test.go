package firewall

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/netfilter"
)

func TestSecondApplyWritesNothing(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		w := n.firewall()
		if first := n.apply(w, sample()); first.SetOps == 0 || first.RuleBytes == 0 || first.Execs == 0 {
			t.Errorf("the first apply wrote %+v", first)
		}
		for _, f := range netfilter.Families {
			want := []string{"-m comment --comment warren -j WARREN-FORWARD"}
			if got := n.rules(f, "mangle", "FORWARD"); !slices.Equal(got, want) {
				t.Errorf("%s: mangle FORWARD has %q", f, got)
			}
			if got := n.rules(f, "mangle", "WARREN-POLICY"); len(got) != 2 {
				t.Errorf("%s: the policy chain has %q", f, got)
			}
		}
		if got, want := n.members(peers(netfilter.IPv4)), []string{"0.0.0.0/1", "10.2.0.0/16", "10.9.9.9"}; !slices.Equal(got, want) {
			t.Errorf("peers are %q, want %q", got, want)
		}
		if got, want := n.members(ports(netfilter.IPv6)), []string{"fd00::2,sctp:8080"}; !slices.Equal(got, want) {
			t.Errorf("ports are %q, want %q", got, want)
		}
		before := n.state()
		if again := n.apply(w, sample()); again != (Changes{}) {
			t.Errorf("the second apply wrote %+v", again)
		}
		w.Forget()
		if again := n.apply(w, sample()); again != (Changes{}) {
			t.Errorf("after Forget an apply wrote %+v", again)
		}
		if adopted := n.apply(n.firewall(), sample()); adopted != (Changes{}) {
			t.Errorf("a new Firewall wrote %+v where all stood", adopted)
		}
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Errorf("applies that wrote nothing changed the kernel:\n%s", diff)
		}
	})
}

func TestMembersChangeWithoutRules(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		w := n.firewall()
		n.apply(w, sample())
		r := sample()
		setIn(&r.V4, peers(netfilter.IPv4)).Entries = addresses("10.2.0.0/16", "10.3.0.0/16")
		setIn(&r.V6, netfilter.ReadySet(netfilter.IPv6)).Entries = addresses("fd00::3", "fd00::4")
		if changes := n.apply(w, r); changes != (Changes{SetOps: 5}) {
			t.Errorf("wrote %+v, want 5 set operations", changes)
		}
		if got, want := n.members(peers(netfilter.IPv4)), []string{"10.2.0.0/16", "10.3.0.0/16"}; !slices.Equal(got, want) {
			t.Errorf("peers are %q, want %q", got, want)
		}
		if got, want := n.members(netfilter.ReadySet(netfilter.IPv6)), []string{"fd00::3", "fd00::4"}; !slices.Equal(got, want) {
			t.Errorf("ready are %q, want %q", got, want)
		}
	})
}

// The plugin takes addresses out of the gate's sets while the daemon runs.
func TestLateSetsAreReadAnew(t *testing.T) {
	n := newNode(t, "nft")
	w := n.firewall()
	n.apply(w, sample())
	n.run("ipset del " + netfilter.ReadySet(netfilter.IPv4) + " 10.1.0.2")
	n.run("ipset add " + netfilter.ReadySet(netfilter.IPv4) + " 10.1.0.77")
	if changes := n.apply(w, sample()); changes != (Changes{SetOps: 2}) {
		t.Errorf("wrote %+v, want 2 set operations", changes)
	}
	want := []string{"10.1.0.2", "10.1.0.3"}
	if got := n.members(netfilter.ReadySet(netfilter.IPv4)); !slices.Equal(got, want) {
		t.Errorf("ready are %q, want %q", got, want)
	}
}

func TestOneChainChanges(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		w := n.firewall()
		n.apply(w, sample())
		r := sample()
		policy := chainIn(&r.V4, "WARREN-POLICY")
		policy.Rules = append(slices.Clone(policy.Rules[:1]), rule("shop/api", "-p udp -j DROP"))
		delta := netfilter.Delta{Table: "mangle", Write: []netfilter.Chain{*policy}}
		if changes := n.apply(w, r); changes != (Changes{RuleBytes: len(delta.Render()), Execs: 1}) {
			t.Errorf("wrote %+v, want %d bytes in one run", changes, len(delta.Render()))
		}
		if got := n.rules(netfilter.IPv4, "mangle", "WARREN-POLICY"); len(got) != 2 || !strings.Contains(got[1], "-p udp") {
			t.Errorf("the policy chain has %q", got)
		}
		if changes := n.apply(n.firewall(), r); changes != (Changes{}) {
			t.Errorf("a new Firewall wrote %+v", changes)
		}
	})
}

// TestChainsAndSetsGo removes a chain and the set that it used, which the chain that jumped to it used too.
func TestChainsAndSetsGo(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		w := n.firewall()
		n.apply(w, without())
		want := n.state()
		n.apply(w, sample())
		n.apply(w, without())
		if diff := cmp.Diff(want, n.state()); diff != "" {
			t.Errorf("going back leaves something else:\n%s", diff)
		}
		n.apply(w, netfilter.Ruleset{})
		if state := n.state(); strings.Contains(strings.ToLower(state), "warren") {
			t.Errorf("an empty ruleset leaves:\n%s", state)
		}
	})
}

// without is the sample without its policy chain, its sets of peers and ports, and its hook in nat.
func without() netfilter.Ruleset {
	r := sample()
	for _, f := range netfilter.Families {
		h := r.Of(f)
		h.Sets = h.Sets[2:]
		h.Hooks = slices.DeleteFunc(h.Hooks, func(h netfilter.Hook) bool { return h.Table == "nat" })
		h.Chains = slices.DeleteFunc(h.Chains, func(c netfilter.Chain) bool {
			return c.Name == "WARREN-POLICY" || c.Table == "nat"
		})
		forward := chainIn(h, "WARREN-FORWARD")
		forward.Rules = forward.Rules[:2]
	}
	return r
}

func TestDriftIsRepaired(t *testing.T) {
	drifts := map[string]func(n *node){
		"rule ahead":     func(n *node) { n.iptables("-t mangle -I FORWARD -i eth7 -j ACCEPT") },
		"hook twice":     func(n *node) { n.iptables("-t mangle -A FORWARD -m comment --comment warren -j WARREN-FORWARD") },
		"hook left over": func(n *node) { n.iptables("-t mangle -A INPUT -m comment --comment warren -j WARREN-FORWARD") },
		"move cut short": func(n *node) {
			n.iptables("-t mangle -I FORWARD -m comment --comment warren-moving -j WARREN-FORWARD")
			n.iptables("-t mangle -D FORWARD -m comment --comment warren -j WARREN-FORWARD")
		},
		"hooks gone":    func(n *node) { n.iptables("-t mangle -F FORWARD"); n.iptables("-F FORWARD") },
		"chain flushed": func(n *node) { n.iptables("-t mangle -F WARREN-POLICY") },
		"rule foreign":  func(n *node) { n.iptables("-t mangle -I WARREN-POLICY -j ACCEPT") },
		"rule gone":     func(n *node) { n.iptables("-t mangle -D WARREN-FORWARD 1") },
		"rules swapped": func(n *node) {
			n.iptables("-t filter -A WARREN-ACCEPT -j DROP")
			n.iptables("-t filter -D WARREN-ACCEPT 1")
		},
		"chain unknown": func(n *node) {
			n.iptables("-t mangle -N WARREN-OLD")
			n.iptables("-t mangle -A WARREN-OLD -j WARREN-POLICY")
		},
		"set flushed":    func(n *node) { n.run("ipset flush " + peers(netfilter.IPv4)) },
		"set unknown":    func(n *node) { n.run("ipset create WARREN-OLD hash:net,port") },
		"member foreign": func(n *node) { n.run("ipset add " + ports(netfilter.IPv6) + " fd00::77,47:0") },
		"all tables": func(n *node) {
			for _, table := range []string{"raw", "mangle", "nat", "filter"} {
				n.iptables("-t " + table + " -F")
				n.iptables("-t " + table + " -X")
			}
		},
	}
	onEach(t, func(n *node) {
		t := n.t
		w := n.firewall()
		n.apply(w, sample())
		healthy := n.state()
		for name, drift := range drifts {
			drift(n)
			if n.state() == healthy {
				t.Errorf("%s: changed nothing", name)
			}
			w.Forget()
			n.apply(w, sample())
			if name == "rule ahead" {
				for _, f := range netfilter.Families {
					got := n.rules(f, "mangle", "FORWARD")
					if len(got) != 2 || !strings.HasSuffix(got[0], "-j WARREN-FORWARD") || !strings.HasSuffix(got[1], "-j ACCEPT") {
						t.Errorf("%s: %s: mangle FORWARD has %q", name, f, got)
					}
				}
				n.iptables("-t mangle -D FORWARD -i eth7 -j ACCEPT")
			}
			if diff := cmp.Diff(healthy, n.state()); diff != "" {
				t.Errorf("%s: not repaired:\n%s", name, diff)
			}
		}
	})
}

func TestForeignThingsStay(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		n.run("ipset create others hash:net")
		n.run("ipset add others 10.0.0.0/8")
		n.iptables("-t mangle -N OTHERS")
		n.iptables(`-t mangle -A OTHERS -m comment --comment "they say -j WARREN-X" -j ACCEPT`)
		n.iptables("-t mangle -A FORWARD -j OTHERS")
		n.iptables("-A FORWARD -i eth7 -j ACCEPT")
		n.iptables("-t nat -A POSTROUTING -o eth7 -j MASQUERADE")
		before := n.state()
		w := n.firewall()
		n.apply(w, sample())
		n.apply(w, without())
		if missing := linesMissing(before, n.state()); len(missing) > 0 {
			t.Errorf("an apply removed %q", missing)
		}
		// Rules of others that lead to our chains cannot outlive these.
		n.iptables(`-t mangle -A OTHERS -m comment --comment "look here" -j WARREN-FORWARD`)
		n.iptables("-t raw -A PREROUTING -p udp -g WARREN-SOURCE")
		if err := Cleanup(t.Context(), n.options().Log); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Errorf("after the clean-up things differ:\n%s", diff)
		}
		if err := Cleanup(t.Context(), n.options().Log); err != nil {
			t.Errorf("a second clean-up: %v", err)
		}
	})
}

// linesMissing returns the lines of a that are not in b.
func linesMissing(a, b string) []string {
	have := strings.Split(b, "\n")
	return slices.DeleteFunc(strings.Split(a, "\n"), func(line string) bool { return slices.Contains(have, line) })
}

// Somebody's own rule keeps an old set and an old chain in use. Pods must start all the same.
func TestLeftOversKeepNothingShut(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		w := n.firewall()
		n.apply(w, sample())
		n.run("iptables-" + n.backend + " -A INPUT -m set --match-set " + peers(netfilter.IPv4) + " src")
		n.run("iptables-" + n.backend + " -t mangle -A INPUT -j WARREN-POLICY")
		r := without()
		setIn(&r.V4, netfilter.ReadySet(netfilter.IPv4)).Entries = addresses("10.1.0.4")
		n.apply(w, r)
		if got, want := n.members(netfilter.ReadySet(netfilter.IPv4)), []string{"10.1.0.4"}; !slices.Equal(got, want) {
			t.Errorf("ready are %q, want %q", got, want)
		}
		if log := n.log.String(); !strings.Contains(log, peers(netfilter.IPv4)) || !strings.Contains(log, "mangle table (ipv4)") {
			t.Errorf("the log does not say what is left behind:\n%s", log)
		}
		if changes := n.apply(w, r); changes != (Changes{}) {
			t.Errorf("tried again at once: %+v", changes)
		}
		n.run("iptables-" + n.backend + " -F INPUT")
		n.run("iptables-" + n.backend + " -t mangle -F INPUT")
		w.Forget()
		n.apply(w, r)
		if state := n.state(); strings.Contains(state, "WARREN-POLICY") || strings.Contains(state, peers(netfilter.IPv4)) {
			t.Errorf("still there:\n%s", state)
		}
	})
}

// Cleanup takes the programs that the node calls iptables.
func TestCleanup(t *testing.T) {
	n := newNode(t, "")
	n.apply(n.firewall(), sample())
	if err := Cleanup(t.Context(), n.options().Log); err != nil {
		t.Fatal(err)
	}
	n.backend = "nft"
	if state := n.state(); strings.Contains(strings.ToLower(state), "warren") {
		t.Errorf("left:\n%s", state)
	}
	n.backend = "legacy"
	if state := n.state(); strings.Contains(strings.ToLower(state), "warren") {
		t.Errorf("left:\n%s", state)
	}
}

// Where the programs are gone, the sets that no rule uses go nevertheless.
func TestCleanupWithoutPrograms(t *testing.T) {
	n := newNode(t, "")
	n.run("ipset create " + peers(netfilter.IPv4) + " hash:net")
	path := os.Getenv("PATH")
	t.Setenv("PATH", t.TempDir())
	err := Cleanup(t.Context(), n.options().Log)
	t.Setenv("PATH", path)
	if err == nil {
		t.Error("without its programs the clean-up says nothing")
	}
	if sets := n.run("ipset list -n"); strings.TrimSpace(sets) != "" {
		t.Errorf("left: %s", sets)
	}
}

func TestLargeSets(t *testing.T) {
	n := newNode(t, "nft")
	r := sample()
	var entries []netfilter.Entry
	for i := range 70_000 {
		entries = append(entries, netfilter.Entry{Prefix: netip.PrefixFrom(netip.AddrFrom4([4]byte{11, byte(i >> 16), byte(i >> 8), byte(i)}), 32)})
	}
	set := setIn(&r.V4, peers(netfilter.IPv4))
	set.Entries = netfilter.Entries(entries)
	// A set that somebody made too small is made anew with room.
	n.run("ipset create " + set.Name + " hash:net maxelem 10")
	n.run("ipset add " + set.Name + " 10.99.0.0/16")
	w := n.firewall()
	n.apply(w, r)
	if got := n.members(set.Name); len(got) != len(entries) {
		t.Errorf("%d members, want %d", len(got), len(entries))
	}
	if changes := n.apply(n.firewall(), r); changes != (Changes{}) {
		t.Errorf("a new Firewall wrote %+v", changes)
	}
	if sets := n.run("ipset list -n"); strings.Contains(sets, "TMP") {
		t.Errorf("a temporary set is left: %s", sets)
	}
	// A policy comes with as many blocks, and with everything, as pkg/policy writes it.
	to := sample()
	*setIn(&to.V4, set.Name) = *set
	to.V4.Sets = append(to.V4.Sets, netfilter.Set{
		Name: "WARREN-B4-MANY", Type: netfilter.HashNet, Entries: netfilter.Entries(append(addresses("0.0.0.0/1", "128.0.0.0/1"), entries...)),
	})
	n.patch(w, r, to)
	if got := n.members("WARREN-B4-MANY"); len(got) != len(entries)+2 {
		t.Errorf("%d members, want %d", len(got), len(entries)+2)
	}
}
