package ipam_test

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/ipam"
)

// FuzzPlain: whatever is read in the fast way encoding/json reads as the same.
func FuzzPlain(f *testing.F) {
	const begin = `{"containerID":"c","interface":"eth0","namespace":"n","name":"p"`
	for _, text := range []string{
		begin + `,"uid":"u","netns":"/n","addresses":["10.0.0.2","fd00::2"]}` + "\n",
		begin + `,"addresses":["fe80::1%<é>"]}` + "\n",
		begin + `,"addresses":[""]}` + "\n",
		begin + `,"addresses":null}` + "\n",
		begin + "]}\n",
		begin + `,"uid":"\u003c\"\\","addresses":["10.0.0.2"]}` + "\n",
		begin + `,"uid":"` + "\xff\x7f\x00" + `","addresses":["10.0.0.2"]}` + "\n",
	} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		got, ok := ipam.Plain(text)
		if !ok {
			return
		}
		var want ipam.Lease
		if err := json.Unmarshal([]byte(text), &want); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, equal); diff != "" {
			t.Errorf("(-encoding/json +plain):\n%s", diff)
		}
	})
}

// FuzzWritten: what a lease's file says is read in the fast way, and as what was written, unless encoding/json escapes one of its texts.
func FuzzWritten(f *testing.F) {
	f.Add("c1", "eth0", "shop", "web-0", "u", "/var/run/netns/cni-1", []byte("\n\x00\x00\x02"))
	f.Add(`c"`, `\`, "<&>", "ü\u2028", "\x7f", "\xff", []byte("fd00::2..........."))
	f.Add("", "", "", "", "", "", []byte{})
	f.Fuzz(func(t *testing.T, id, ifname, namespace, name, uid, netns string, address []byte) {
		want := ipam.Lease{Owner: ipam.Owner{ContainerID: id, Interface: ifname, Namespace: namespace, Name: name, UID: uid, Netns: netns}}
		a, ok := netip.AddrFromSlice(address)
		if !ok {
			a = netip.MustParseAddr("10.0.0.2")
		}
		want.Addresses = []netip.Addr{a, a.Next()}
		if !want.Addresses[1].IsValid() {
			want.Addresses = want.Addresses[:1]
		}
		text, err := json.Marshal(want)
		if err != nil {
			t.Fatal(err)
		}
		got, ok := ipam.Plain(string(text) + "\n")
		if escapes := strings.Contains(string(text), `\`); ok == escapes {
			t.Fatalf("read %v: %s", ok, text)
		}
		if diff := cmp.Diff(want, got, equal); ok && diff != "" {
			t.Errorf("(-written +read):\n%s", diff)
		}
	})
}

// The names that Kubernetes and runtimes give are read in the fast way, and any other is read.
func TestWrittenIsRead(t *testing.T) {
	for text, fast := range map[string]bool{
		"web-7c5ddbdf54-00001": true, "/var/run/netns/cni-3f1c9b1e": true, "ünïcode 世界": true,
		`quo"te`: false, `back\slash`: false, "<a>&b": false, "line\nline": false, "\u2028": false,
	} {
		t.Run(text, func(t *testing.T) {
			dir := t.TempDir()
			o := owner(1)
			o.Namespace, o.Name, o.UID, o.Netns = text, text, text, text
			as := allocate(t, open(t, dir), prefixes("10.0.0.0/24", "fd00::/64"), o)
			file, err := os.ReadFile(filepath.Join(dir, as[0].String()))
			if err != nil {
				t.Fatal(err)
			}
			if _, ok := ipam.Plain(string(file)); ok != fast {
				t.Errorf("read in the fast way: %v: %s", ok, file)
			}
			leases, err := open(t, dir).List()
			if err != nil {
				t.Error(err)
			}
			if diff := cmp.Diff([]ipam.Lease{{Owner: o, Addresses: as}}, leases, equal); diff != "" {
				t.Errorf("leases (-want +got):\n%s", diff)
			}
		})
	}
}
