package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/inflight"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/podlink"
)

// nothingValid makes a GC's configuration that names no attachment as valid.
func nothingValid(c map[string]any) { c["cni.dev/valid-attachments"] = []any{} }

// mustExec runs a command of the plugin, which has to succeed.
func (n *node) mustExec(p *pod, command string, change ...func(map[string]any)) string {
	n.t.Helper()
	out, stderr, err := n.exec(p, command, change...)
	if err != nil || stderr != "" {
		n.t.Fatalf("%s of %s: %v\n%s%s", command, p.rt.ContainerID, err, out, stderr)
	}
	return out
}

// TestGCBesideADD: a GC that begins while an ADD is at work, and ends before or after it, takes nothing of it away, although the
// runtime does not name its attachment yet. It does what else there is to do meanwhile, and waits for nobody.
func TestGCBesideADD(t *testing.T) {
	n := newNode(t)
	p, gone := n.newPod("web"), n.newPod("gone")
	n.mustAdd(gone)
	withoutGone := func(state string) string { return strings.ReplaceAll(state, "c-gone", "") }
	n.daemon.answers(func(req agentapi.Request) *agentapi.Error {
		if req.Op == agentapi.OpAttach {
			n.within(func() { n.mustExec(p, "GC", nothingValid) })
		}
		return nil
	})
	result := n.mustExec(p, "ADD")
	n.daemon.answers(nil)
	n.mustExec(p, "CHECK", func(c map[string]any) { c["prevResult"] = json.RawMessage(result) })
	if state := n.state(p); withoutGone(state) != state {
		t.Errorf("GC left what it had to remove:\n%s", state)
	}
	// The control: once the ADD is over the same GC takes everything.
	n.mustExec(p, "GC", nothingValid)
	if left := run(t, n, "ip -br link show type veth; ls "+n.runDir+"/ipam"); left != "" || len(n.open()) > 0 {
		t.Errorf("GC of all left %q and %v", left, n.open())
	}
}

// TestADDEndsWhileGCLooks: an ADD that is at work when a GC closes the door, and ends while the GC looks what there is, keeps all it has made.
func TestADDEndsWhileGCLooks(t *testing.T) {
	n := newNode(t)
	p, gone := n.newPod("web"), n.newPod("gone")
	n.mustAdd(gone)
	attaches, goesOn := make(chan struct{}), make(chan struct{})
	n.daemon.answers(func(req agentapi.Request) *agentapi.Error {
		if req.Op == agentapi.OpAttach {
			close(attaches)
			<-goesOn
		}
		return nil
	})
	read := func(path string) string {
		text, err := os.ReadFile(path)
		if err != nil && !os.IsNotExist(err) {
			t.Error(err)
		}
		return string(text)
	}
	added := make(chan string)
	go n.within(func() {
		out, stderr, err := n.exec(p, "ADD")
		if err != nil || stderr != "" {
			t.Errorf("ADD: %v: %s%s", err, out, stderr)
		}
		added <- out
	})
	<-attaches
	// It asks for the links when it has read the directory of the leases.
	trace := filepath.Join(t.TempDir(), "trace")
	n.under = []string{"strace", "-f", "-qq", "-o", trace, "-e", "trace=getdents64,sendto", "-e", "inject=sendto:delay_enter=2s:when=1"}
	collected := make(chan struct{})
	go n.within(func() {
		defer close(collected)
		if out, stderr, err := n.exec(gone, "GC", nothingValid); err != nil || out+stderr != "" {
			t.Errorf("GC: %v: %s%s", err, out, stderr)
		}
	})
	for text := ""; !strings.Contains(text, "getdents64("); text = read(trace) {
		select {
		case <-collected:
			t.Fatal("the GC has read no directory")
		default:
			runtime.Gosched()
		}
	}
	close(goesOn)
	result := <-added
	select {
	case <-collected:
		t.Fatal("the GC was over before the ADD")
	default:
	}
	<-collected
	n.under = nil
	n.daemon.answers(nil)
	if err := n.check(p, result); err != nil {
		t.Error(err)
	}
	if left := run(t, n, "ls "+n.runDir+"/ipam"); strings.Contains(left, "c-gone") || !strings.Contains(left, "c-web") {
		t.Errorf("left %q, want the lease of c-web alone", left)
	}
}

// TestGCWithFewFiles: a GC takes away more than it may open files for.
func TestGCWithFewFiles(t *testing.T) {
	n := newNode(t)
	before := n.state()
	store, err := ipam.Open(filepath.Join(n.runDir, "ipam"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 50 {
		owner := ipam.Owner{ContainerID: fmt.Sprintf("c-%d", i), Interface: "eth0"}
		if _, err = store.Allocate([]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, owner); err != nil {
			t.Fatal(err)
		}
	}
	n.under = []string{"prlimit", "--nofile=32:32"}
	n.mustExec(&pod{}, "GC", nothingValid)
	n.under = nil
	n.unchanged(before)
}

// TestGCLocksWhatItFinds: between the moment in which a GC sees an attachment and that in which it takes it away nobody can delete it and add
// it anew. What somebody works on it does not find.
func TestGCLocksWhatItFinds(t *testing.T) {
	n := newNode(t)
	gone, worked, kept := n.newPod("gone"), n.newPod("worked"), n.newPod("kept")
	for _, p := range []*pod{gone, worked, kept} {
		n.mustAdd(p)
	}
	link := func(p *pod) string { return podlink.HostName(p.rt.ContainerID, p.rt.IfName) }
	locks := inflight.In(n.runDir)
	ended, err := locks.Begin(t.Context(), link(worked))
	if err != nil {
		t.Fatal(err)
	}
	defer ended()
	leases, err := ipam.Open(filepath.Join(n.runDir, "ipam"))
	if err != nil {
		t.Fatal(err)
	}
	free := func() bool {
		t.Helper()
		done, ok, err := locks.Try(link(gone))
		if err != nil {
			t.Fatal(err)
		}
		if ok {
			done()
		}
		return ok
	}
	if !free() {
		t.Fatal("somebody works on it before")
	}
	remains, end, err := findRemains(t.Context(), locks, leases, map[string]bool{link(kept): true})
	if err != nil || len(remains) != 1 || remains[0].link != link(gone) {
		t.Fatalf("found %+v, %v; want what is gone alone", remains, err)
	}
	if free() {
		t.Error("others may work on what is found")
	}
	end()
	if !free() {
		t.Error("its lock is not given back")
	}
}

// TestGCBesideAll: a GC beside ADDs that are at work when it begins, ADDs that begin meanwhile, and DELs, removes exactly what the runtime
// does not name and none of these has added, and nobody fails.
func TestGCBesideAll(t *testing.T) {
	n := newNode(t)
	group := func(name string) (pods []*pod) {
		for i := range 5 {
			pods = append(pods, n.newPod(fmt.Sprintf("%s-%d", name, i)))
		}
		return pods
	}
	kept, gone, ended, begun, later := group("kept"), group("gone"), group("ended"), group("begun"), group("later")
	var results sync.Map
	add := func(p *pod) error {
		out, stderr, err := n.exec(p, "ADD")
		if err != nil || stderr != "" {
			return fmt.Errorf("ADD: %w: %s%s", err, out, stderr)
		}
		results.Store(p, out)
		return nil
	}
	n.atOnce(slices.Concat(kept, gone, ended), add)
	var valid []any
	for _, p := range kept {
		valid = append(valid, map[string]any{"containerID": p.rt.ContainerID, "ifname": p.rt.IfName})
	}
	work := make(chan struct{}, len(begun)+len(later))
	collects, added := make(chan struct{}), make(chan struct{})
	n.daemon.answers(func(req agentapi.Request) *agentapi.Error {
		switch req.Op {
		case agentapi.OpAttach:
			work <- struct{}{}
			<-collects
		case agentapi.OpRemoveChained:
			close(collects) // the GC has seen what there is
			<-added
		}
		return nil
	})
	var adds, rest sync.WaitGroup
	adds.Go(func() { n.atOnce(begun, add) })
	for range begun {
		<-work
	}
	adds.Go(func() { <-collects; n.atOnce(later, add) })
	rest.Go(func() { n.atOnce(ended, n.del) })
	rest.Go(func() {
		n.atOnce([]*pod{{}}, func(p *pod) error {
			out, stderr, err := n.exec(p, "GC", func(c map[string]any) { c["cni.dev/valid-attachments"] = valid })
			if err != nil || out+stderr != "" {
				return fmt.Errorf("GC: %w: %s%s", err, out, stderr)
			}
			return nil
		})
	})
	adds.Wait()
	close(added)
	rest.Wait()
	n.daemon.answers(nil)

	stand := slices.Concat(kept, begun, later)
	for _, p := range stand {
		if result, ok := results.Load(p); !ok {
			t.Errorf("%s was not added", p.rt.ContainerID)
		} else if err := n.check(p, result.(string)); err != nil {
			t.Errorf("%s: %v", p.rt.ContainerID, err)
		}
	}
	left := strings.Fields(run(t, n, "ls "+n.runDir+"/ipam | grep @"))
	if links := strings.Fields(run(t, n, "ip -o link show type veth | grep -o 'wrn[^@]*'")); len(left) != len(stand) || len(links) != len(stand) || len(n.open()) != 2*len(stand) {
		t.Errorf("there stand %v with links %v and addresses %v, want %d of each", left, links, n.open(), len(stand))
	}
	// The control: the same GC takes all of them when nothing is valid.
	n.mustExec(&pod{}, "GC", nothingValid)
	if left := run(t, n, "ip -br link show type veth; ls "+n.runDir+"/ipam"); left != "" || len(n.open()) > 0 {
		t.Errorf("GC of all left %q and %v", left, n.open())
	}
}

// TestDELBesideADD: a DEL of an attachment whose ADD is still at work waits for it, so that nothing of it comes afterwards.
func TestDELBesideADD(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	before := n.state(p)
	deleted := make(chan string)
	n.daemon.answers(func(req agentapi.Request) *agentapi.Error {
		if req.Op != agentapi.OpAttach {
			return nil
		}
		go n.within(func() {
			out, stderr, err := n.exec(p, "DEL")
			if err != nil {
				t.Error(err)
			}
			deleted <- out + stderr
		})
		n.untilSomebodyWaits()
		return nil
	})
	n.mustExec(p, "ADD")
	if out := <-deleted; out != "" {
		t.Error(out)
	}
	n.unchanged(before, p)
}

// TestGCGoesOn: what cannot be removed is in the error, and keeps nothing else from being removed.
func TestGCGoesOn(t *testing.T) {
	n := newNode(t)
	before := n.state()
	for _, name := range []string{"one", "two", "three"} {
		n.mustAdd(n.newPod(name))
	}
	obstacle := filepath.Join(n.runDir, "ipam", ".cooling", "10.244.1.3") // where the address of the second would cool down
	if err := os.Mkdir(obstacle, 0o700); err != nil {
		t.Fatal(err)
	}
	unpin := pin(t, obstacle)
	out, _, err := n.exec(&pod{}, "GC", nothingValid)
	if err == nil || !strings.Contains(out, "c-two@eth0") || strings.Contains(out, "c-one") || strings.Contains(out, "c-three") {
		t.Errorf("GC: %v: %s, want an error that names the second alone", err, out)
	}
	left := run(t, n, "ip -br link show type veth; cd "+n.runDir+"/ipam; ls -d [0-9c]*")
	if strings.TrimSpace(left) != "10.244.1.3" || len(n.open()) > 0 {
		t.Errorf("GC left %q and %v", left, n.open())
	}
	unpin()
	n.mustExec(&pod{}, "GC", nothingValid)
	n.unchanged(before)
}

// TestGCRemovesChained: the lease of a container outlasts what other plugins have made for it; its link does not, and no other container's.
func TestGCRemovesChained(t *testing.T) {
	n := newNode(t)
	p, gone, kept := n.newPod("web"), n.newPod("gone"), n.newPod("kept")
	n.mustAdd(kept)
	before := n.state(p, gone, kept)
	n.mustAdd(p)
	n.mustAdd(gone)
	store, err := ipam.Open(filepath.Join(n.runDir, "ipam"))
	if err != nil {
		t.Fatal(err)
	}
	second := ipam.Owner{ContainerID: kept.rt.ContainerID, Interface: "net1", Namespace: "shop", Name: "kept"}
	if _, err = store.Allocate([]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, second); err != nil {
		t.Fatal(err)
	}
	valid := func(c map[string]any) {
		c["cni.dev/valid-attachments"] = []any{map[string]any{"containerID": kept.rt.ContainerID, "ifname": kept.rt.IfName}}
	}
	var asked [][]string
	refusal := &agentapi.Error{Code: types.ErrInternal, Message: "no luck"}
	n.daemon.answers(func(req agentapi.Request) *agentapi.Error {
		if req.Op != agentapi.OpRemoveChained {
			return nil
		}
		asked = append(asked, req.Containers)
		if !slices.Contains(req.Containers, "c-web") {
			return nil
		}
		return refusal
	})
	out, _, err := n.exec(p, "GC", valid)
	if err == nil || !strings.Contains(out, "c-web, whose lease stays until then") || !strings.Contains(out, "no luck") || strings.Contains(out, "c-gone") {
		t.Errorf("GC: %v: %s, want an error that names the one container", err, out)
	}
	left := run(t, n, "ip -br link show type veth up; ls "+n.runDir+"/ipam")
	if strings.Count(left, "wrn") != 1 || !strings.Contains(left, "c-web@eth0") || strings.Contains(left, "c-gone") {
		t.Errorf("left:\n%s\nwant one link, and the lease of c-web", left)
	}
	refusal = nil
	n.mustExec(p, "GC", valid)
	n.unchanged(before, p, gone, kept)
	if diff := cmp.Diff([][]string{{"c-gone", "c-web"}, {"c-gone"}, {"c-web"}, {"c-web"}}, asked); diff != "" {
		t.Errorf("the daemon was asked for (-want +got):\n%s", diff)
	}
}

// within calls do on a thread that is on the node.
func (n *node) within(do func()) {
	err := n.Do(func(ns.NetNS) error {
		do()
		return nil
	})
	if err != nil {
		n.t.Error(err)
	}
}

// untilSomebodyWaits returns when a process waits for the lock of an attachment.
func (n *node) untilSomebodyWaits() {
	var file unix.Stat_t
	if err := unix.Stat(filepath.Join(n.runDir, inflight.FileName), &file); err != nil {
		n.t.Error(err)
		return
	}
	waits := regexp.MustCompile(fmt.Sprintf(`-> OFDLCK .*:%d `, file.Ino))
	for n.t.Context().Err() == nil {
		locks, err := os.ReadFile("/proc/locks")
		if err != nil {
			n.t.Error(err)
			return
		}
		if waits.Match(locks) {
			return
		}
		runtime.Gosched()
	}
}

// TestGC: exactly what the runtime does not name is removed, and nothing where it names no list.
func TestGC(t *testing.T) {
	n := newNode(t)
	kept := n.newPod("kept")
	n.mustAdd(kept)
	before := n.state(kept)

	gone, orphan, killed := n.newPod("gone"), n.newPod("orphan"), n.newPod("killed")
	for _, p := range []*pod{gone, orphan, killed} {
		n.mustAdd(p)
	}
	run(t, n, "cd "+n.runDir+"/ipam; rm c-orphan@eth0 10.244.1.4 fd00:10:244:1::4") // a link without a lease
	run(t, n, "cd "+n.runDir+"/ipam; rm c-killed@eth0 10.244.1.5; ipset del WARREN-READY4 10.244.1.4; ipset del WARREN-READY6 fd00:10:244:1::4; "+
		"ipset del WARREN-READY4 10.244.1.5") // what a killed DEL leaves
	full := n.state(kept)

	for name, change := range map[string]func(map[string]any){
		"without the key": func(map[string]any) {},
		"with null":       func(c map[string]any) { c["cni.dev/valid-attachments"] = nil },
	} {
		if out, _, err := n.exec(kept, "GC", change); err != nil {
			t.Errorf("GC %s: %v: %s", name, err, out)
		}
		n.unchanged(full, kept)
	}

	// A file that is no lease keeps GC from nothing.
	junk := filepath.Join(n.runDir, "ipam", "junk")
	if err := os.WriteFile(junk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{binaries}, t.TempDir(), executor()) // so that libcni itself deletes nothing
	list := n.conflist()
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "c-kept", IfName: "eth0"}, {ContainerID: "c-never", IfName: "eth0"}}}
	err := n.cni.GCNetworkList(context.Background(), list, args)
	if err != nil {
		t.Errorf("GC: %v", err)
	}
	if err = os.Remove(junk); err != nil {
		t.Fatal(err)
	}
	n.unchanged(before, kept)

	args.ValidAttachments = []types.GCAttachment{}
	if err = n.cni.GCNetworkList(context.Background(), list, args); err != nil {
		t.Errorf("GC of all: %v", err)
	}
	if left := run(t, n, "ip -br link show type veth; ls "+n.runDir+"/ipam"); left != "" || len(n.open()) > 0 {
		t.Errorf("GC of all left %q and %v", left, n.open())
	}
}
