package netfilter_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/netfilter"
)

func TestNamesAreIdentities(t *testing.T) {
	seen := map[string][]string{}
	for _, parts := range [][]string{
		{"a", "bc"}, {"ab", "c"}, {"abc"}, {"a", "b", "c"}, {"", "abc"}, {"abc", ""}, {"1:a"}, {"a", "1:"}, {}, {""},
	} {
		name := netfilter.Name("I", parts...)
		if other, ok := seen[name]; ok {
			t.Errorf("%q and %q have one name", parts, other)
		}
		seen[name] = parts
		if again := netfilter.Name("I", parts...); again != name {
			t.Errorf("%q has two names, %s and %s", parts, name, again)
		}
	}
	if netfilter.Name("I", "x") == netfilter.Name("E", "x") {
		t.Error("a name does not tell its kind")
	}
	if netfilter.SetName(netfilter.IPv4, "P", "x") == netfilter.SetName(netfilter.IPv6, "P", "x") {
		t.Error("a set's name does not tell its family, and the kernel has one name space for both")
	}
	long := strings.Repeat("x", 1000)
	if n := len(netfilter.Name("kind", long)); n > 28 {
		t.Errorf("a chain's name has %d characters", n)
	}
	if n := len(netfilter.SetName(netfilter.IPv6, "kind", long)); n > 31 {
		t.Errorf("a set's name has %d characters", n)
	}
}

func TestHash(t *testing.T) {
	rule := netfilter.Rule{Args: []string{"-s", "10.0.0.1", "-j", "DROP"}, Comment: "shop/api"}
	changes := map[string]netfilter.Rule{
		"argument": {Args: []string{"-s", "10.0.0.2", "-j", "DROP"}, Comment: "shop/api"},
		"border":   {Args: []string{"-s 10.0.0.1", "-j", "DROP"}, Comment: "shop/api"},
		"comment":  {Args: rule.Args, Comment: "shop/web"},
		"moved":    {Args: append(slices.Clone(rule.Args), "shop/api")},
	}
	for name, changed := range changes {
		if changed.Hash() == rule.Hash() {
			t.Errorf("%s: a changed rule has the same hash", name)
		}
	}
}

func TestHashOf(t *testing.T) {
	for listed, want := range map[string]string{
		`-A WARREN-X -m comment --comment "ABCDEFGH23 shop/api ingress 0" -j DROP`: "ABCDEFGH23",
		`-A WARREN-X -m comment --comment ABCDEFGH23 -j DROP`:                      "ABCDEFGH23",
		`-A WARREN-X -s 10.0.0.1/32 -m comment --comment "ABCDEFGH23" -j DROP`:     "ABCDEFGH23",
		`-A FORWARD -m comment --comment warren -j WARREN-FORWARD`:                 "",
		`-A FORWARD -m comment --comment "kubernetes forwarding rules" -j X`:       "",
		`-A FORWARD -j DROP`: "",
		``:                   "",
	} {
		if got := netfilter.HashOf(listed); got != want {
			t.Errorf("HashOf(%s) = %q, want %q", listed, got, want)
		}
	}
}

func TestDelta(t *testing.T) {
	rule := netfilter.Rule{Args: []string{"-p", "tcp", "-j", "WARREN-B"}, Comment: `a "quoted" \ name` + "\n\u00e9"}
	bare := netfilter.Rule{Args: []string{"-j", "DROP"}}
	got := netfilter.Delta{
		Table: "mangle",
		Write: []netfilter.Chain{
			{Table: "mangle", Name: "WARREN-A", Rules: []netfilter.Rule{rule}},
			{Table: "mangle", Name: "WARREN-B", Rules: []netfilter.Rule{bare}},
		},
		Delete: []string{"WARREN-OLD"},
	}.Render()
	want := `*mangle
:WARREN-A - [0:0]
:WARREN-B - [0:0]
:WARREN-OLD - [0:0]
-A WARREN-A -p tcp -m comment --comment "` + rule.Hash() + ` a ?quoted? ? name??" -j WARREN-B
-A WARREN-B -m comment --comment "` + bare.Hash() + `" -j DROP
-X WARREN-OLD
COMMIT
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the delta differs (-want +got):\n%s", diff)
	}
}

// A comment that is too long is cut behind its hash, which covers all of it.
func TestLongComment(t *testing.T) {
	one := netfilter.Rule{Args: []string{"-j", "DROP"}, Comment: strings.Repeat("x", 300) + "1"}
	two := netfilter.Rule{Args: []string{"-j", "DROP"}, Comment: strings.Repeat("x", 300) + "2"}
	if one.Hash() == two.Hash() {
		t.Error("the end of a long comment does not count")
	}
	text := netfilter.Delta{Table: "mangle", Write: []netfilter.Chain{{Name: "WARREN-A", Rules: []netfilter.Rule{one}}}}.Render()
	_, comment, _ := strings.Cut(text, `"`)
	comment, _, _ = strings.Cut(comment, `"`)
	if len(comment) > 255 || !strings.HasPrefix(comment, one.Hash()+" xxx") {
		t.Errorf("the comment is %q", comment)
	}
}

func TestClosed(t *testing.T) {
	chain := netfilter.Chain{
		Table: "mangle", Name: "WARREN-I-X", Closable: []string{"shop/api", "shop/db"},
		Rules: []netfilter.Rule{{Args: []string{"-p", "sctp", "-j", "RETURN"}}, {Args: []string{"-j", "DROP"}}},
	}
	closed := chain.Closed()
	text := netfilter.Delta{Table: "mangle", Write: []netfilter.Chain{closed}}.Render()
	if want := "not applied, so closed: shop/api shop/db\" -j DROP\nCOMMIT"; strings.Count(text, "-A ") != 1 || !strings.Contains(text, want) {
		t.Errorf("the closed chain is\n%s", text)
	}
	if closed.Name != chain.Name || closed.Table != chain.Table || len(chain.Rules) != 2 {
		t.Errorf("%+v became %+v", chain, closed)
	}
}

func TestRender(t *testing.T) {
	address := netip.MustParseAddr("fd00::1")
	port := netfilter.Address(address)
	port.Protocol, port.Port = "sctp", 7777
	got := netfilter.Ruleset{V6: netfilter.Rules{
		Sets: []netfilter.Set{
			{Name: "WARREN-A6", Type: netfilter.HashIP, Comment: "a set", Entries: []netfilter.Entry{netfilter.Address(address)}},
			{Name: "WARREN-B6", Type: netfilter.HashIPPort, Entries: []netfilter.Entry{port}},
			{Name: "WARREN-C6", Type: netfilter.HashNet, Entries: []netfilter.Entry{{Prefix: netip.MustParsePrefix("fd00::/64")}}},
		},
		Chains: []netfilter.Chain{{Table: "filter", Name: "WARREN-X"}, {Table: "raw", Name: "WARREN-X"}},
		Hooks: []netfilter.Hook{
			{Table: "filter", BuiltIn: "FORWARD", Chain: "WARREN-X", Append: true},
			{Table: "raw", BuiltIn: "PREROUTING", Chain: "WARREN-X"},
		},
	}}.Render()
	want := `# ipv4
# ipv6
# a set
create WARREN-A6 hash:ip family inet6
add WARREN-A6 fd00::1
create WARREN-B6 hash:ip,port family inet6
add WARREN-B6 fd00::1,sctp:7777
create WARREN-C6 hash:net family inet6
add WARREN-C6 fd00::/64
*filter
:WARREN-X - [0:0]
COMMIT
*raw
:WARREN-X - [0:0]
COMMIT
hook -t filter -A FORWARD -m comment --comment warren -j WARREN-X
hook -t raw -I PREROUTING -m comment --comment warren -j WARREN-X
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the text differs (-want +got):\n%s", diff)
	}
}

func TestMergeSorts(t *testing.T) {
	half := func(name string) netfilter.Ruleset {
		rules := netfilter.Rules{
			Sets:   []netfilter.Set{{Name: "WARREN-" + name}},
			Chains: []netfilter.Chain{{Table: "mangle", Name: "WARREN-" + name}},
			Hooks:  []netfilter.Hook{{Table: "mangle", BuiltIn: "FORWARD", Chain: "WARREN-" + name}},
		}
		return netfilter.Ruleset{V4: rules, V6: rules}
	}
	ab, ba := netfilter.Merge(half("A"), half("B")), netfilter.Merge(half("B"), half("A"))
	if diff := cmp.Diff(ab, ba); diff != "" {
		t.Errorf("the order of merging counts:\n%s", diff)
	}
	if len(ab.V4.Chains) != 2 || ab.V4.Chains[0].Name != "WARREN-A" || len(ab.V6.Sets) != 2 {
		t.Errorf("the merged rules are %v", ab)
	}
}

func TestEntries(t *testing.T) {
	entry := func(s string) netfilter.Entry { return netfilter.Entry{Prefix: netip.MustParsePrefix(s)} }
	tcp, udp := entry("10.0.0.1/32"), entry("10.0.0.1/32")
	tcp.Protocol, tcp.Port = "tcp", 80
	udp.Protocol, udp.Port = "udp", 53
	got := netfilter.Entries([]netfilter.Entry{udp, entry("10.0.0.0/8"), tcp, entry("9.0.0.0/8"), entry("10.0.0.0/7"), tcp})
	want := []netfilter.Entry{entry("9.0.0.0/8"), entry("10.0.0.0/7"), entry("10.0.0.0/8"), tcp, udp}
	if !slices.Equal(got, want) {
		t.Errorf("the entries are %v, want %v", got, want)
	}
}
