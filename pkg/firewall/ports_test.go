package firewall

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// portsOf is the nat table with the port of one pod of each network, as portmap writes it.
func portsOf(networks ...string) string {
	text := `*nat
:PREROUTING ACCEPT [0:0]
:OUTPUT ACCEPT [0:0]
:POSTROUTING ACCEPT [0:0]
:CNI-HOSTPORT-DNAT - [0:0]
:CNI-HOSTPORT-MASQ - [0:0]
:CNI-HOSTPORT-SETMARK - [0:0]
:KUBE-SERVICES - [0:0]
`
	for _, network := range networks {
		text += ":CNI-DN-" + network + " - [0:0]\n"
	}
	text += `-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-A POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-A CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE
-A CNI-HOSTPORT-SETMARK -m comment --comment "CNI portfwd masquerade mark" -j MARK --set-xmark 0x2000/0x2000
`
	for _, network := range networks {
		for _, protocol := range []string{"tcp", "udp"} {
			text += `-A CNI-HOSTPORT-DNAT -p ` + protocol + ` -m comment --comment "dnat name: \"` + network + `\" id: \"abc\"" -m multiport --dports 80 -j CNI-DN-` + network + "\n" +
				`-A CNI-DN-` + network + ` -p ` + protocol + ` -m ` + protocol + " --dport 80 -j DNAT --to-destination 10.244.1.5:80\n"
		}
	}
	return text + "COMMIT\n"
}

// The ports of a network's pods go, with portmap's chains where it is the last network; those of others stay, whatever their names.
func TestRemovePorts(t *testing.T) {
	for _, backend := range backends {
		for name, networks := range map[string][]string{
			"ours alone": {"warren"}, "ours and others": {"warren", "bridge", "warren-2"}, "others alone": {"bridge"},
		} {
			t.Run(backend+" "+name, func(t *testing.T) {
				n := newNode(t, backend)
				suites, err := findSuites(programs{}, "")
				if err != nil {
					t.Fatal(err)
				}
				for f, address := range map[netfilter.Family]string{netfilter.IPv4: "10.244.1.5:80", netfilter.IPv6: "[fd00::5]:80"} {
					if err = suites[backend][f].write(t.Context(), strings.ReplaceAll(portsOf(networks...), "10.244.1.5:80", address)); err != nil {
						t.Fatal(err)
					}
				}
				before := n.state()
				for range 2 {
					if err = RemovePorts(t.Context(), "warren", nil); err != nil {
						t.Fatal(err)
					}
				}
				want := slices.DeleteFunc(strings.Split(before, "\n"), func(line string) bool {
					ours := strings.Contains(line, "CNI-DN-warren ") || strings.HasSuffix(line, "CNI-DN-warren")
					return ours || name == "ours alone" && strings.Contains(line, "CNI-HOSTPORT")
				})
				if diff := cmp.Diff(strings.Join(want, "\n"), n.state()); diff != "" {
					t.Errorf("(-want +got):\n%s", diff)
				}
				if others := name == "others alone"; others != (n.state() == before) || !strings.Contains(n.state(), "KUBE-SERVICES") {
					t.Errorf("was the state left alone? %v", !others)
				}
			})
		}
	}
}

// portmap's chains without a rule for any pod, as they stand once the last such pod has gone, go too; a table without them is left.
func TestWithoutPorts(t *testing.T) {
	t.Parallel()
	all := portMaps{network: "warren", all: true}
	if got := all.without("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"); got != "" {
		t.Errorf("without portmap: %q", got)
	}
	want := `*nat
-D PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-D OUTPUT -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT
-D POSTROUTING -m comment --comment "CNI portfwd requiring masquerade" -j CNI-HOSTPORT-MASQ
-F CNI-HOSTPORT-DNAT
-F CNI-HOSTPORT-MASQ
-F CNI-HOSTPORT-SETMARK
-X CNI-HOSTPORT-DNAT
-X CNI-HOSTPORT-MASQ
-X CNI-HOSTPORT-SETMARK
COMMIT
`
	if diff := cmp.Diff(want, all.without(portsOf())); diff != "" {
		t.Errorf("chains of portmap alone (-want +got):\n%s", diff)
	}
}

// One container's ports go alone, with its chain; portmap's own chains stay, also where nobody's ports are left.
func TestRemovePortsOf(t *testing.T) {
	t.Parallel()
	text := strings.ReplaceAll(portsOf("warren"), `id: \"abc\"`, `id: \"abcd\"`)
	if got := (portMaps{network: "warren", containers: []string{"abc"}}).without(text); got != "" {
		t.Errorf("another container's: %q", got)
	}
	want := `*nat
-D CNI-HOSTPORT-DNAT -p tcp -m comment --comment "dnat name: \"warren\" id: \"abcd\"" -m multiport --dports 80 -j CNI-DN-warren
-D CNI-HOSTPORT-DNAT -p udp -m comment --comment "dnat name: \"warren\" id: \"abcd\"" -m multiport --dports 80 -j CNI-DN-warren
-F CNI-DN-warren
-X CNI-DN-warren
COMMIT
`
	if diff := cmp.Diff(want, portMaps{network: "warren", containers: []string{"abcd"}}.without(text)); diff != "" {
		t.Errorf("its own (-want +got):\n%s", diff)
	}
}

// A backend that will never do holds no ports, and keeps nobody from removing those of the other one.
func TestRemovePortsBesideUselessBackend(t *testing.T) {
	tools := t.TempDir()
	foreign := filepath.Join(tools, "rules")
	err := os.WriteFile(foreign, []byte("table ip nat { chain PREROUTING { type nat hook prerouting priority -100; dnat to tcp dport map { 80 : 192.0.2.1, 81 : 192.0.2.2 }; }; }\n"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"iptables-nft-save", "ip6tables-nft-save"} {
		text := "#!/bin/sh\necho 'Failed to initialize nft: Protocol not supported' >&2\nexit 1\n"
		if err := os.WriteFile(filepath.Join(tools, program), []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for name, prepare := range map[string]func(t *testing.T, n *node){
		"rules of nft itself": func(_ *testing.T, n *node) { n.run("nft -f " + foreign) },
		"no nftables":         func(t *testing.T, _ *node) { t.Setenv("PATH", tools+":"+os.Getenv("PATH")) },
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, legacy)
			suites, err := findSuites(programs{}, "")
			if err != nil {
				t.Fatal(err)
			}
			if err = suites[legacy][netfilter.IPv4].write(t.Context(), portsOf("warren")); err != nil {
				t.Fatal(err)
			}
			prepare(t, n)
			if err = RemovePortsOf(t.Context(), "warren", "abc"); err != nil {
				t.Error(err)
			}
			if left := n.run("iptables-legacy-save -t nat"); strings.Contains(left, "CNI-DN-") || !strings.Contains(left, portChain) {
				t.Errorf("left:\n%s", left)
			}
		})
	}
	t.Run("none will do", func(t *testing.T) {
		n := newNode(t, nft)
		n.run("nft -f " + foreign)
		for _, program := range []string{"iptables-legacy-save", "ip6tables-legacy-save"} {
			if err := os.Symlink(filepath.Join(tools, "iptables-nft-save"), filepath.Join(tools, program)); err != nil {
				t.Fatal(err)
			}
		}
		t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
		if err := RemovePortsOf(t.Context(), "warren", "abc"); err == nil || !strings.Contains(err.Error(), "not supported") {
			t.Errorf("got %v", err)
		}
	})
}

// nftPortsOf is portmap's table of nftables with a port of each container, as it writes it.
func nftPortsOf(family, address string, containers ...string) string {
	text := "table " + family + " cni_hostport {\ncomment \"CNI portmap plugin\"\n"
	chain := func(head string, rules ...string) {
		text += "chain " + head + "\n" + strings.Join(rules, "\n") + "\n}\n"
	}
	var ports, masquerades []string
	for _, c := range containers {
		ports = append(ports, `tcp dport 80 dnat to `+address+`:8080 comment "`+c+`"`, `udp dport 53 dnat to `+address+`:53 comment "`+c+`"`)
		plain := strings.Trim(address, "[]")
		masquerades = append(masquerades, family+" saddr "+plain+" "+family+" daddr "+plain+` masquerade comment "`+c+`"`)
	}
	chain("hostports {", ports...)
	chain("hostip_hostports {")
	chain("hostports_all {", "jump hostip_hostports", "jump hostports")
	chain("prerouting {", "type nat hook prerouting priority -100; policy accept;", "fib daddr type local jump hostports_all")
	chain("output {", "type nat hook output priority -100; policy accept;", "fib daddr type local jump hostports_all")
	chain("masquerading {", append([]string{"type nat hook postrouting priority 100; policy accept;"}, masquerades...)...)
	return text + "}\n"
}

// The ports of our containers go from portmap's table of nftables, too, with the table where it is no other's; so does a table that
// nobody's ports are left in. Other tables stay, whatever is in them.
func TestRemoveNFTPorts(t *testing.T) {
	id := func(c string) string { return strings.Repeat(c, 64) }
	for name, tt := range map[string]struct{ before, after []string }{
		"ours alone":      {[]string{id("a"), id("b")}, nil},
		"ours and others": {[]string{id("c"), id("a"), id("d"), id("b")}, []string{id("c"), id("d")}},
		"others alone":    {[]string{id("c")}, []string{id("c")}},
		"nobody's":        {[]string{}, nil},
		"many":            {append(slices.Repeat([]string{id("a")}, 300), id("c")), []string{id("c")}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, nft)
			load := func(containers []string) string {
				text := `table ip other { chain hostports { tcp dport 80 accept comment "` + id("a") + `"; }; }` + "\n"
				if containers != nil {
					text += nftPortsOf("ip", "10.244.1.5", containers...) + nftPortsOf("ip6", "[fd00::5]", containers...)
				}
				file := filepath.Join(t.TempDir(), "rules")
				if err := os.WriteFile(file, []byte("flush ruleset\n"+text), 0o600); err != nil {
					t.Fatal(err)
				}
				n.run("nft -f " + file)
				return n.run("nft list ruleset")
			}
			want := load(tt.after)
			before := load(tt.before)
			for range 2 {
				if err := RemovePorts(t.Context(), "warren", []string{id("a"), id("b")}); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(want, n.run("nft list ruleset")); diff != "" {
				t.Errorf("(-want +got):\n%s\nof %s", diff, before)
			}

			want = load(slices.DeleteFunc(slices.Clone(tt.before), func(c string) bool { return c == id("a") }))
			load(tt.before)
			if err := RemovePortsOf(t.Context(), "warren", id("a")); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, n.run("nft list ruleset")); diff != "" {
				t.Errorf("one container (-want +got):\n%s", diff)
			}
		})
	}
}

// A transaction that others came before is refused, and does nothing.
func TestTransactionIsOfOneGeneration(t *testing.T) {
	n := newNode(t, nft)
	n.run("nft add table ip " + portTable)
	s, err := openSocket()
	if err != nil {
		t.Fatal(err)
	}
	remove := func(generation uint32) error {
		s.beginNFT(unix.NFNL_MSG_BATCH_BEGIN, unix.AF_UNSPEC)
		s.messages = appendUint32(s.messages, nfnlBatchGenID, generation)
		s.beginNFT(nftMessage|unix.NFT_MSG_DELTABLE, unix.NFPROTO_IPV4)
		s.messages = appendString(s.messages, unix.NFTA_TABLE_NAME, portTable)
		defer s.discard()
		return s.transact()
	}
	generation, err := s.generation()
	if err != nil {
		t.Fatal(err)
	}
	n.run("nft add table ip another")
	if err = remove(generation); !errors.Is(err, unix.ERESTART) {
		t.Errorf("the old generation: %v", err)
	}
	if tables, err := s.tables(); err != nil || !slices.Contains(tables, portTable) {
		t.Errorf("tables %v, %v", tables, err)
	}
	if generation, err = s.generation(); err != nil {
		t.Fatal(err)
	}
	if err = remove(generation); err != nil {
		t.Errorf("the generation: %v", err)
	}
	if err = remove(generation + 1); !errors.Is(err, unix.ENOENT) {
		t.Errorf("no table: %v", err)
	}
}
