package trace_test

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/internal/trace"
)

// text wraps lines into a table with a chain WARREN-A.
func text(lines ...string) string {
	return "*mangle\n:WARREN-A - [0:0]\n:WARREN-B - [0:0]\n" + strings.Join(lines, "\n") + "\nCOMMIT\n" +
		"hook -t mangle -I FORWARD -m comment --comment warren -j WARREN-A\n"
}

// A tracer that passes over what it does not know would let every test pass.
func TestRefusesTheUnknown(t *testing.T) {
	for _, line := range []string{
		"-A WARREN-A --frobnicate -j DROP",
		"-A WARREN-A -m mark --mark 1 -j DROP",
		"-A WARREN-A -m mark -m connmark --mark 1/1 -j DROP",
		"-A WARREN-A -j MARK",
		"-A WARREN-A -j MARK --set-xmark 2/1",
		"-A WARREN-A -j MARK --set-mark 1/1",
		"-A WARREN-A --mark 1/1 -j DROP",
		"-A WARREN-A -m connmark --mark 1 -j DROP",
		"-A WARREN-A -m connmark --mark 2/1 -j DROP",
		"-A WARREN-A -p igmp -j DROP",
		"-A WARREN-A --dport 80 -j DROP",
		"-A WARREN-A -p tcp --dport 90:80 -j DROP",
		"-A WARREN-A -p tcp --dport http -j DROP",
		"-A WARREN-A -p tcp --tcp-flags ALL NONE -j DROP",
		"-A WARREN-A -p udp --syn -j DROP",
		"-A WARREN-A -s 10.0.0.1/8 -j DROP",
		"-A WARREN-A -s 10.0.0.300 -j DROP",
		"-A WARREN-A --ctstate NEW -j DROP",
		"-A WARREN-A -m conntrack --ctstate OLD -j DROP",
		"-A WARREN-A --match-set WARREN-S src -j DROP",
		"-A WARREN-A -m set --match-set WARREN-S src,dst -j DROP",
		"-A WARREN-A -m addrtype --src-type UNICAST -j DROP",
		"-A WARREN-A --invert -j DROP",
		"-A WARREN-A -i interface-name-too-long -j DROP",
		"-A WARREN-A -j REJECT",
		"-A WARREN-A -j DROP --now",
		"-A WARREN-A -m limit --limit 1/second -j DROP",
		"-A WARREN-A --limit 1/second -j NFLOG --nflog-group 1 --nflog-size 9 --nflog-prefix A",
		"-A WARREN-A -j NFLOG --nflog-group 1 --nflog-size 9 --nflog-prefix A",
		"-A WARREN-A -m limit -j NFLOG --nflog-group 1",
		"-A WARREN-A -m limit -j NFLOG --nflog-group 1 --nflog-size 9 --nflog-prefix " + strings.Repeat("A", 64),
		"-A WARREN-A -j MASQUERADE",
		"-A WARREN-A -i",
		"-A WARREN-A ! -j DROP",
		"-A WARREN-A -i eth0",
		`-A WARREN-A -m comment --comment "open -j DROP`,
		"-A WARREN-C -j DROP",
		"-I WARREN-A -j DROP",
		":WARREN-A - [0:0]",
		":WARREN-C ACCEPT [0:0]",
		"create WARREN-S hash:mac family inet",
		"create WARREN-S hash:ip",
		"add WARREN-S 10.0.0.1",
		"create WARREN-S hash:ip family inet\nadd WARREN-S 10.0.0.0/24",
		"create WARREN-S hash:ip family inet\nadd WARREN-S 10.0.0.1\nadd WARREN-S 10.0.0.1",
		"create WARREN-S hash:net family inet\nadd WARREN-S 0.0.0.0/0",
		"create WARREN-S hash:ip,port family inet\nadd WARREN-S 10.0.0.1",
		"hook -t mangle -I FORWARD -j WARREN-A",
	} {
		_, err := trace.Parse(text(line))
		if err == nil {
			t.Errorf("%s was read without an error", line)
		}
	}
}

func TestWalk(t *testing.T) {
	filter, err := trace.Parse("create WARREN-S hash:ip,port family inet\nadd WARREN-S 10.0.0.2,udp:53\n" + text(
		"-A WARREN-A -i wrn+ -s 10.0.0.1 -d 10.0.0.0/24 -p tcp --dport 80:90 -j DROP",
		`-A WARREN-A -m comment --comment "HASH to the set" -p udp -m set --match-set WARREN-S dst,dst -j DROP`,
		"-A WARREN-A -m connmark --mark 0x2/0x6 -j DROP",
		"-A WARREN-A -p tcp --dport 22 -j WARREN-B",
		"-A WARREN-A -p tcp --dport 23 -g WARREN-B",
		"-A WARREN-A -p sctp ! --dport 1 -j DROP",
		"-A WARREN-A -p tcp -j ACCEPT",
		"-A WARREN-B -m conntrack --ctstate NEW -j RETURN",
		"-A WARREN-B -j DROP",
	))
	if err != nil {
		t.Fatal(err)
	}
	base := trace.Packet{
		In: "wrn1", Src: netip.MustParseAddr("10.0.0.1"), Dst: netip.MustParseAddr("10.0.0.2"), Protocol: "tcp", DstPort: 85, State: "NEW",
	}
	for _, c := range []struct {
		name   string
		change func(*trace.Packet)
		want   string
	}{
		{"all matches hold", func(*trace.Packet) {}, "DROP"},
		{"another interface", func(p *trace.Packet) { p.In = "eth0" }, "ACCEPT"},
		{"another source", func(p *trace.Packet) { p.Src = p.Dst }, "ACCEPT"},
		{"another destination", func(p *trace.Packet) { p.Dst = netip.MustParseAddr("10.0.1.2") }, "ACCEPT"},
		{"beyond the range", func(p *trace.Packet) { p.DstPort = 91 }, "ACCEPT"},
		{"in the set", func(p *trace.Packet) { p.Protocol, p.DstPort = "udp", 53 }, "DROP"},
		{"another port than in the set", func(p *trace.Packet) { p.Protocol, p.DstPort = "udp", 54 }, ""},
		{"marked", func(p *trace.Packet) { p.DstPort, p.ConnMark = 91, 3 }, "DROP"},
		{"marked otherwise", func(p *trace.Packet) { p.DstPort, p.ConnMark = 91, 6 }, "ACCEPT"},
		{"negated, does not hold", func(p *trace.Packet) { p.Protocol, p.DstPort = "sctp", 1 }, ""},
		{"negated, holds", func(p *trace.Packet) { p.Protocol, p.DstPort = "sctp", 2 }, "DROP"},
		{"jump, returns to the caller", func(p *trace.Packet) { p.DstPort = 22 }, "ACCEPT"},
		{"goto, returns to the caller's caller", func(p *trace.Packet) { p.DstPort = 23 }, ""},
		{"jump, ends below", func(p *trace.Packet) { p.DstPort, p.State = 22, "RELATED" }, "DROP"},
	} {
		p := base
		c.change(&p)
		verdict, walkErr := filter.Walk("mangle", "FORWARD", p)
		if walkErr != nil {
			t.Fatal(walkErr)
		}
		if verdict.Target != c.want {
			t.Errorf("%s: %q, want %q; by %q", c.name, verdict.Target, c.want, verdict.Trail)
		}
	}
	_, err = filter.Walk("raw", "PREROUTING", base)
	if err == nil {
		t.Error("a hook that is not there was walked")
	}
}

// A mark is the packet's from the rule that sets it on, also behind the chain of that rule and at the next hook.
func TestMarked(t *testing.T) {
	filter, err := trace.Parse(text(
		"-A WARREN-A -i wrn+ -j WARREN-B",
		"-A WARREN-A -m mark ! --mark 0x4/0x6 -j DROP",
		"-A WARREN-B -m mark --mark 0x8/0x8 -j RETURN",
		"-A WARREN-B -j MARK --set-xmark 0x4/0x6",
	))
	if err == nil {
		err = filter.Lint()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		in, want    string
		before, now uint32
	}{
		{"wrn1", "", 0x3, 0x5},
		{"wrn1", "DROP", 0xb, 0xb},
		{"eth0", "", 0x5, 0x5},
		{"eth0", "DROP", 0x3, 0x3},
	} {
		got, walkErr := filter.Walk("mangle", "FORWARD", trace.Packet{In: c.in, Mark: c.before, ConnMark: ^uint32(0)})
		if walkErr != nil || got.Target != c.want || got.Mark != c.now {
			t.Errorf("from %s with %#x: %+v, %v, want %q with %#x", c.in, c.before, got, walkErr, c.want, c.now)
		}
	}
}

// What is logged goes on.
func TestLogged(t *testing.T) {
	const log = "-A WARREN-A -m limit --limit 10/second --limit-burst 5 -j NFLOG --nflog-group 1 --nflog-size 9 --nflog-prefix "
	filter, err := trace.Parse(text(log+"A", "-A WARREN-A -p udp -j RETURN", log+"B", "-A WARREN-A -j WARREN-B", "-A WARREN-B -j DROP"))
	if err == nil {
		err = filter.Lint()
	}
	if err != nil {
		t.Fatal(err)
	}
	for protocol, want := range map[string]trace.Verdict{
		"udp": {Logged: []string{"A"}}, "tcp": {Target: "DROP", Logged: []string{"A", "B"}},
	} {
		got, walkErr := filter.Walk("mangle", "FORWARD", trace.Packet{Protocol: protocol})
		if walkErr != nil || got.Target != want.Target || !slices.Equal(got.Logged, want.Logged) {
			t.Errorf("%s: %+v, %v, want %+v", protocol, got, walkErr, want)
		}
	}
}

func TestLint(t *testing.T) {
	const good = "-A WARREN-A -j WARREN-B"
	for name, c := range map[string]struct{ text, want string }{
		"nothing wrong":     {text(good), ""},
		"jump to nowhere":   {text(good, "-A WARREN-B -j WARREN-C"), "jumps to WARREN-C"},
		"orphan":            {text(), "WARREN-B in mangle is an orphan"},
		"loop":              {text(good, "-A WARREN-B -j WARREN-A"), "runs in a loop"},
		"set not there":     {text(good, "-A WARREN-B -m set --match-set WARREN-S src -j DROP"), "WARREN-S, which is not there"},
		"set not used":      {"create WARREN-S hash:ip family inet\n" + text(good), "WARREN-S is used by no rule"},
		"sides of a set":    {"create WARREN-S hash:ip family inet\n" + text(good, "-A WARREN-B -m set --match-set WARREN-S dst,dst -j DROP"), "by 2 sides"},
		"two hooks":         {text(good) + "hook -t mangle -I POSTROUTING -m comment --comment warren -j WARREN-A\n", "more than one hook"},
		"appended":          {strings.Replace(text(good), "-I FORWARD", "-A FORWARD", 1), "wrong end"},
		"foreign hook":      {strings.Replace(text(good), "-I FORWARD", "-I INPUT", 1), "nothing of ours belongs into mangle INPUT"},
		"unreachable rule":  {text("-A WARREN-A -g WARREN-B", good), "no packet comes past rule 1"},
		"accept in mangle":  {text(good, "-A WARREN-B -j ACCEPT"), "goes round everybody else's rules"},
		"translates there":  {text(good, "-A WARREN-B -j MASQUERADE --random-fully"), "MASQUERADE does not belong into mangle"},
		"long name":         {strings.ReplaceAll(text(good), "WARREN-B", "WARREN-"+strings.Repeat("B", 22)), "longer than 28"},
		"not ours":          {strings.ReplaceAll(text(good), "WARREN-B", "KUBE-B"), "KUBE-B is not ours"},
		"rpfilter too late": {text(good, "-A WARREN-B -m rpfilter --invert -j DROP"), "--invert has no meaning in FORWARD"},
		"marks elsewhere":   {strings.Replace(text(good, "-A WARREN-B -j MARK --set-xmark 1/1"), "*mangle", "*raw", 1), "MARK does not belong into raw"},
	} {
		filter, err := trace.Parse(c.text)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		err = filter.Lint()
		switch {
		case c.want == "" && err != nil:
			t.Errorf("%s: %v", name, err)
		case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
			t.Errorf("%s: the lint says %v, want %q", name, err, c.want)
		}
	}
}
