package firewall

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// Messages that are sent together are told apart where the kernel, or the encoding, refuses some: the error is that of the set and the
// member, and everything else is done. The socket then answers the next request, whatever came back.
func TestMembersOfManySets(t *testing.T) {
	const sets = 1000
	n := newNode(t, nft)
	s, err := openSocket()
	if err != nil {
		t.Fatal(err)
	}
	k := kernelSets{s}
	var lists []memberList
	for i := range sets {
		l := memberList{set: fmt.Sprint("WARREN-", i), typ: netfilter.HashIP, members: addresses("10.0.0.1", "10.0.0.2", "10.0.0.3")}
		if err := k.Create(l.set, set{typ: l.typ, family: netfilter.IPv4, max: 10}); err != nil {
			t.Fatal(err)
		}
		lists = append(lists, l)
	}
	good := func(when string, errs []error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	good("all is well", k.Add(lists...))
	good("again", k.Add(lists...))
	good("all leave", k.Remove(lists...))

	wrong := map[int]string{0: "fd00::1", 7: "10.0.0.0/8", 500: "fd00::1", sets - 1: "fd00::1"}
	for i, member := range wrong {
		lists[i].members = []netfilter.Entry{lists[i].members[0], addresses(member)[0], lists[i].members[2]}
	}
	for i := 20; i < 400; i++ {
		lists[i].set = fmt.Sprint("WARREN-NONE", i)
	}
	for i, err := range k.Add(lists...) {
		var want []string
		switch {
		case wrong[i] != "":
			want = []string{lists[i].set + ":", "member " + wrong[i]}
		case i >= 20 && i < 400:
			want = []string{lists[i].set + ":", unix.ENOENT.Error()}
		}
		if (err == nil) != (want == nil) {
			t.Errorf("set %d: error is %v", i, err)
		}
		for _, word := range want {
			if err != nil && !strings.Contains(err.Error(), word) {
				t.Errorf("set %d: the error does not say %q: %v", i, word, err)
			}
		}
	}
	have, err := k.List("")
	if err != nil || len(have) != sets {
		t.Fatalf("%d sets, error %v", len(have), err)
	}
	for i := range sets {
		want := 3
		switch {
		case wrong[i] != "":
			want = 2
		case i >= 20 && i < 400:
			want = 0
		}
		if got := have[fmt.Sprint("WARREN-", i)].members; len(got) != want {
			t.Errorf("set %d has %v", i, got)
		}
	}
	if got := n.members("WARREN-0"); len(got) != 2 {
		t.Errorf("ipset lists %q", got)
	}
}

// TestListBesideALargeSet lists sets with sockets that have not received anything, which is when kernels before 6.9 break off at another
// program's set in whose first bucket there is more than 4 kB. Which bucket its members are in, of 64, is by chance.
func TestListBesideALargeSet(t *testing.T) {
	n := newNode(t, nft)
	file := filepath.Join(t.TempDir(), "sets")
	text := "create LARGE hash:net,iface comment\n"
	for i := range 60 {
		text += fmt.Sprintf("add LARGE 10.0.0.0/8,wl%d comment %s\n", i, strings.Repeat("x", 250))
	}
	if err := os.WriteFile(file, []byte(text+"create WARREN-1 hash:ip\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	brokenOff := 0
	for range 300 {
		n.run("ipset -file " + file + " restore")
		s, err := openSocket()
		if err != nil {
			t.Fatal(err)
		}
		_, once := kernelSets{s}.listOnce("")
		if errors.Is(once, unix.EMSGSIZE) {
			brokenOff++
		}
		if s, err = openSocket(); err != nil {
			t.Fatal(err)
		}
		sets, err := kernelSets{s}.List("")
		if err != nil || sets["WARREN-1"] == nil {
			t.Fatalf("%d sets, %v", len(sets), err)
		}
		n.run("ipset destroy")
	}
	t.Logf("%d listings were broken off", brokenOff)
}
