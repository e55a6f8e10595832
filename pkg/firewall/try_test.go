package firewall

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/preflight"
)

// used finds matches, protocols that load a match, and targets in rules.
var used = regexp.MustCompile(`-(m) ([a-z]+)|-(j) ([A-Z0-9]+)(?: |$)`)

// namesOf are the matches and targets of rules, in the words of features.
func namesOf(rules string) []string {
	var names []string
	for line := range strings.Lines(rules) {
		for _, m := range used.FindAllStringSubmatch(strings.TrimSpace(line), -1) {
			switch {
			case m[1] != "":
				names = append(names, "match "+m[2])
			case m[4] != "ACCEPT" && m[4] != "DROP" && m[4] != "RETURN":
				names = append(names, "target "+m[4])
			}
		}
		for _, protocol := range []string{"tcp", "udp", "sctp"} {
			if strings.Contains(line, "-p "+protocol+" ") {
				names = append(names, "match "+protocol)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// TestFeaturesAreAll compares what is tried with what the golden rules of pkg/guard and pkg/policy use.
func TestFeaturesAreAll(t *testing.T) {
	var rules strings.Builder
	for _, pattern := range []string{"../guard/testdata/*.rules", "../policy/testdata/*/want.rules"} {
		files, err := filepath.Glob(pattern)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %v, %v", pattern, files, err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			rules.Write(text)
		}
	}
	want := namesOf(rules.String())
	for _, f := range netfilter.Families {
		var have []string
		for _, one := range features(f) {
			have = append(have, one.name)
		}
		slices.Sort(have)
		if diff := cmp.Diff(want, have); diff != "" {
			t.Errorf("%s: rules use (-), and tried is (+):\n%s", f, diff)
		}
	}
}

// crippled is a machine whose iptables or kernel lacks an extension.
type crippled struct {
	programs
	word string
}

func (w crippled) Run(ctx context.Context, stdin, path string, args ...string) (stdout, stderr string, err error) {
	if w.word != "" && strings.Contains(stdin, w.word) {
		return "", "iptables-restore: " + w.word + ": No such file or directory", errors.New("exit status 1")
	}
	return w.programs.Run(ctx, stdin, path, args...)
}

// noType lacks a type of set.
type noType struct {
	ipsets
	typ netfilter.SetType
}

func (n noType) Create(name string, s set) error {
	if s.typ == n.typ {
		return errors.New("invalid argument")
	}
	return n.ipsets.Create(name, s)
}

func TestTry(t *testing.T) {
	for _, backend := range backends {
		for name, c := range map[string]struct {
			word string
			typ  netfilter.SetType
			want []string
		}{
			"all is there": {want: nil},
			"no rpfilter":  {word: "-m rpfilter", want: []string{"match rpfilter (ipv4)", "match rpfilter (ipv6)"}},
			"no xt_set":    {word: "-m set", want: []string{"match set (ipv4)", "match set (ipv6)"}},
			"no NFLOG":     {word: "-j NFLOG", want: []string{"target NFLOG (ipv4)", "target NFLOG (ipv6)"}},
			"no conntrack": {word: "-m conntrack", want: []string{"match conntrack (ipv4)", "match conntrack (ipv6)"}},
			"no nat":       {word: "*nat", want: []string{"target MASQUERADE (ipv4)", "target SNAT (ipv4)", "target MASQUERADE (ipv6)", "target SNAT (ipv6)"}},
			"no hash:net":  {typ: netfilter.HashNet, want: []string{"set hash:net (ipv4)", "set hash:net (ipv6)"}},
			"no hash:ip":   {typ: netfilter.HashIP, want: []string{"set hash:ip (ipv4)", "set hash:ip (ipv6)"}},
		} {
			t.Run(fmt.Sprintf("%s, %s", name, backend), func(t *testing.T) {
				newNode(t, backend)
				s, err := openSocket()
				if err != nil {
					t.Fatal(err)
				}
				lacks, err := try(t.Context(), crippled{word: c.word}, noType{kernelSets{s}, c.typ}, backend)
				if err != nil {
					t.Fatal(err)
				}
				if diff := cmp.Diff(c.want, featuresOf(lacks)); diff != "" {
					t.Errorf("what is lacking differs (-want +got):\n%s", diff)
				}
			})
		}
	}
}

func featuresOf(lacks []preflight.Lack) []string {
	var names []string
	for _, l := range lacks {
		names = append(names, l.Feature)
	}
	return names
}

// TestLook looks at rules of both backends and at tables of nftables, and leaves everything as it is.
func TestLook(t *testing.T) {
	n := newNode(t, "")
	look := func() (string, preflight.Filter) {
		t.Helper()
		backend, seen, err := Look(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return backend, seen
	}
	if backend, seen := look(); backend != nft || len(seen.Chains)+len(seen.Tables)+len(seen.Problems) > 0 {
		t.Errorf("on a clean node: %s, %+v", backend, seen)
	}
	tables, err := os.ReadFile("/proc/thread-self/net/ip_tables_names")
	if err != nil || len(tables) > 0 {
		t.Errorf("after a look the legacy tables are %q, %v", tables, err)
	}
	n.run("iptables-nft -N cali-FORWARD")
	n.run("ip6tables-nft -t mangle -N ufw6-before-input")
	if backend, seen := look(); backend != nft || !slices.Equal(seen.Chains, []string{"cali-FORWARD", "ufw6-before-input"}) ||
		!slices.Equal(seen.Tables, []string{"filter", "mangle"}) || len(seen.Problems) > 0 {
		t.Errorf("with rules in nft: %s, %+v", backend, seen)
	}
	n.run("iptables-legacy -t nat -N KUBE-SERVICES")
	if backend, seen := look(); backend != legacy || !slices.Contains(seen.Chains, "KUBE-SERVICES") || len(seen.Problems) != 1 {
		t.Errorf("with both: %s, %+v", backend, seen)
	}
}
