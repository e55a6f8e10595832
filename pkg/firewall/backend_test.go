package firewall

import (
	"errors"
	"log/slog"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// What other programs leave in a backend, as iptables-save lists it.
const (
	clean = `*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [3:180]
COMMIT
`
	warren = `*mangle
:FORWARD ACCEPT [0:0]
:WARREN-FORWARD - [0:0]
-A FORWARD -m comment --comment warren -j WARREN-FORWARD
-A WARREN-FORWARD -m comment --comment "ABCDEFGHIJ gate" -j DROP
COMMIT
`
	docker = `*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
COMMIT
`
	admin   = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n"
	kubelet = "*mangle\n:KUBE-IPTABLES-HINT - [0:0]\n:KUBE-KUBELET-CANARY - [0:0]\nCOMMIT\n"
	proxy   = "*nat\n:KUBE-SERVICES - [0:0]\n-A PREROUTING -j KUBE-SERVICES\nCOMMIT\n"
)

func TestPrefer(t *testing.T) {
	for name, c := range map[string]struct {
		nft, legacy, want string
		mixed             bool
	}{
		"clean node":                            {clean, clean, nft, false},
		"only ours, of an earlier choice":       {clean, warren, nft, false},
		"others in nft":                         {docker, warren, nft, false},
		"others in legacy":                      {warren, docker, legacy, false},
		"a rule in a built-in chain is a use":   {clean, admin, legacy, false},
		"a chain without rules is a use":        {clean, kubelet, legacy, false},
		"both":                                  {docker, admin, nft, true},
		"both, Kubernetes in legacy":            {docker, proxy, legacy, true},
		"both, Kubernetes in nft":               {proxy, docker, nft, true},
		"left by kube-proxy, kubelet in nft":    {kubelet, proxy, nft, true},
		"left by kube-proxy, kubelet in legacy": {proxy, kubelet, legacy, true},
		"Kubernetes in both":                    {kubelet, kubelet, nft, true},
	} {
		found := map[string]usage{}
		for backend, saved := range map[string]string{nft: c.nft, legacy: c.legacy} {
			u := usage{}
			u.count(saved)
			found[backend] = u
		}
		if got := prefer(found); got != c.want {
			t.Errorf("%s: chose %s, want %s", name, got, c.want)
		}
		if got := mixed(c.want, found); len(got) > 0 != c.mixed {
			t.Errorf("%s: the problems are %v", name, got)
		}
	}
	if got := prefer(map[string]usage{legacy: {}}); got != legacy {
		t.Errorf("with legacy alone it chose %s", got)
	}
	if got := prefer(map[string]usage{nft: {}}); got != nft {
		t.Errorf("with nft alone it chose %s", got)
	}
}

func TestBackendOfOthersIsUsed(t *testing.T) {
	n := newNode(t, "")
	expect := func(want string) *Firewall {
		t.Helper()
		w := n.firewall()
		if w.Backend() != want {
			t.Errorf("the backend is %s, want %s", w.Backend(), want)
		}
		return w
	}
	if w := expect(nft); len(w.Problems()) > 0 {
		t.Errorf("on a clean node the problems are %v", w.Problems())
	}
	// To look must not make the tables of the legacy backend, which every packet would then go through.
	tables, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if err != nil || len(tables) > 0 {
		t.Errorf("the legacy tables are %q, %v", tables, err)
	}
	n.run("ip6tables-legacy -A FORWARD -j ACCEPT")
	expect(legacy)
	n.run("iptables-nft -N DOCKER-USER")
	w := expect(nft)
	if len(w.Problems()) != 1 {
		t.Fatalf("with both in use the problems are %v", w.Problems())
	}
	p := w.Problems()[0]
	for _, want := range []string{"BackendsMixed", "nft: 0 rules, chains of DOCKER", "legacy: 1 rules", "update-alternatives"} {
		if !strings.Contains(p.String(), want) {
			t.Errorf("the problem does not say %q: %s", want, p)
		}
	}
	n.run("iptables-legacy -t mangle -N KUBE-IPTABLES-HINT")
	expect(legacy)
}

// Where a backend cannot be read another one is chosen only if that is in use; else it may be the one that the node uses.
func TestBackendThatCannotBeRead(t *testing.T) {
	n := newNode(t, "")
	suites, err := findSuites(programs{}, "")
	if err != nil {
		t.Fatal(err)
	}
	var x faults
	x.into(&Firewall{tools: suites[nft]})
	fail := func(suites map[string]suite) (string, error) {
		x.failAt = len(x.calls) + 1
		backend, _, err := choose(t.Context(), n.options().Log, suites)
		return backend, err
	}
	if backend, err := fail(suites); !errors.Is(err, errInjected) {
		t.Errorf("on a node where nothing else is known it chose %q with error %v", backend, err)
	}
	if _, err = fail(map[string]suite{nft: suites[nft]}); !errors.Is(err, errInjected) {
		t.Errorf("with no other backend the error is %v", err)
	}
	n.run("iptables-legacy -A FORWARD -j ACCEPT")
	if backend, err := fail(suites); backend != legacy || err != nil {
		t.Errorf("chose %q with error %v", backend, err)
	}
	if !strings.Contains(n.log.String(), errInjected.Error()) {
		t.Errorf("the log does not say why:\n%s", n.log.String())
	}
}

// What a backend says that will never do.
func TestBackendThatWillNeverDo(t *testing.T) {
	for text, want := range map[string]bool{
		"iptables-nft-save v1.8.9 (nf_tables): Failed to initialize nft: Protocol not supported": true,
		"Table `filter' is incompatible, use 'nft' tool.":                                        true,
		"Could not fetch rule set generation id: Permission denied (you must be root)":           false,
	} {
		if got := isUseless(errors.New(text)); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}

// TestSwitchOfBackend goes from one backend to the other and back: the rules in the old one stay until those in the new one stand.
func TestSwitchOfBackend(t *testing.T) {
	n := newNode(t, legacy)
	for _, backend := range backends {
		n.run("iptables-" + backend + " -t mangle -N OTHERS")
		n.run("iptables-" + backend + " -t mangle -A FORWARD -j OTHERS")
	}
	both := func() string { return n.stateOf(legacy) + "\n" + n.stateOf(nft) }
	before := both()
	n.apply(n.firewall(), sample())
	for _, backend := range backends {
		old := n.stateOf(n.backend)
		n.backend = backend
		w := n.firewall()
		bad := sample()
		chainIn(&bad.V6, "WARREN-SOURCE").Rules = []netfilter.Rule{rule("", "-j NOSUCH")}
		if _, err := w.Apply(t.Context(), bad); err == nil {
			t.Fatal("a bad rule was applied")
		}
		if diff := cmp.Diff(oursIn(old), oursIn(n.stateOf(other(backend)))); diff != "" {
			t.Errorf("before all stood in %s, the other changed:\n%s", backend, diff)
		}
		n.apply(w, sample())
		if left := oursIn(n.stateOf(other(backend))); len(left) > 0 {
			t.Errorf("left in the backend that is not used: %q", left)
		}
		if len(oursIn(n.stateOf(backend))) == 0 {
			t.Errorf("nothing stands in %s", backend)
		}
	}
	if err := Cleanup(t.Context(), slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, both()); diff != "" {
		t.Errorf("other programs' rules changed:\n%s", diff)
	}
}

func TestCleanupOfBothBackends(t *testing.T) {
	n := newNode(t, "")
	for _, n.backend = range backends {
		w := n.firewall()
		w.abandoned = nil // as if the rules in the other backend could not be removed
		n.apply(w, sample())
	}
	if len(oursIn(n.stateOf(legacy))) == 0 || len(oursIn(n.stateOf(nft))) == 0 {
		t.Fatal("the rules do not stand in both")
	}
	if err := Cleanup(t.Context(), slog.New(slog.DiscardHandler)); err != nil {
		t.Fatal(err)
	}
	for _, backend := range backends {
		if state := n.stateOf(backend); strings.Contains(strings.ToLower(state), "warren") {
			t.Errorf("left in %s:\n%s", backend, state)
		}
	}
}

// other returns the other backend.
func other(backend string) string {
	return map[string]string{nft: legacy, legacy: nft}[backend]
}

// stateOf is state with another backend.
func (n *node) stateOf(backend string) string {
	n.t.Helper()
	own := n.backend
	n.backend = backend
	defer func() { n.backend = own }()
	return n.state()
}

// oursIn returns the rules and chains of a state that are ours.
func oursIn(state string) []string {
	return slices.DeleteFunc(strings.Split(state, "\n"), func(line string) bool {
		return !strings.Contains(line, "tables-") || !strings.Contains(line, netfilter.Prefix)
	})
}
