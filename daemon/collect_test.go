package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/inflight"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/testnode"
)

// yard is a collector with a clock, links and pods that a test sets, and a lease of the container "old".
type yard struct {
	*collector
	t    *testing.T
	now  time.Time
	up   map[string]bool // host links that stand
	pods map[string]bool // uids of pods that exist
	dir  string          // of network namespaces
	run  string          // the run directory
	// ports are the containers whose ports were removed, and errPorts is what that comes to.
	ports    []string
	errPorts error
}

func newYard(t *testing.T) *yard {
	t.Helper()
	testnode.Enter(t)
	runDir := t.TempDir()
	leases, err := ipam.Open(filepath.Join(runDir, "ipam"))
	if err != nil {
		t.Fatal(err)
	}
	y := &yard{t: t, now: time.Unix(1000, 0), up: map[string]bool{}, pods: map[string]bool{"u-old": true}, dir: t.TempDir(), run: runDir}
	y.collector = &collector{
		leases: leases, locks: inflight.In(runDir), log: slog.New(slog.DiscardHandler),
		clock: func() time.Time { return y.now },
		links: func() (names []string, err error) {
			for name, up := range y.up {
				if up {
					names = append(names, name)
				}
			}
			return names, nil
		},
		exists: func(o ipam.Owner) bool { return y.pods[o.UID] },
		removeChained: func(_ context.Context, containers ...string) error {
			y.ports = append(y.ports, containers...)
			return y.errPorts
		},
	}
	y.lease("old", "old")
	return y
}

// lease leases an address to a container of a pod.
func (y *yard) lease(container, pod string) netip.Addr {
	y.t.Helper()
	addresses, err := y.leases.Allocate([]netip.Prefix{netip.MustParsePrefix("10.244.1.0/24")}, ipam.Owner{
		ContainerID: container, Interface: "eth0", Namespace: "shop", Name: pod, UID: "u-" + pod, Netns: filepath.Join(y.dir, container),
	})
	if err != nil {
		y.t.Fatal(err)
	}
	return addresses[0]
}

// namespace puts a network namespace where that of a container is.
func (y *yard) namespace(container string) {
	y.t.Helper()
	if err := os.Symlink("/proc/self/ns/net", filepath.Join(y.dir, container)); err != nil {
		y.t.Fatal(err)
	}
}

// look lets some time pass, in which the collector looks as often as it does, and says whether the old container has its lease.
func (y *yard) look(d time.Duration) (held bool) {
	y.t.Helper()
	for end := y.now.Add(d); y.now.Before(end); y.now = y.now.Add(collectEvery) {
		y.collect(y.t.Context())
	}
	addresses, err := y.leases.Held("old", "eth0")
	if err != nil {
		y.t.Fatal(err)
	}
	return len(addresses) > 0
}

// long is more than enough for everything that is collected at all.
const long = 10 * goneFor

func TestCollect(t *testing.T) {
	link := podlink.HostName("old", "eth0")
	tests := map[string]struct {
		prepare func(*yard)
		kept    bool
	}{
		"the link stands":                          {func(y *yard) { y.up[link], y.pods["u-old"] = true, false }, true},
		"the namespace stands":                     {func(y *yard) { y.namespace("old"); y.pods["u-old"] = false }, true},
		"nothing stands, and the daemon sees none": {func(*yard) {}, true},
		"nothing stands, and the pod is gone":      {func(y *yard) { y.pods["u-old"] = false }, false},
		"the namespace is gone from among others":  {func(y *yard) { y.stands("other"); y.file("other") }, false},
		"a file without a namespace says nothing":  {func(y *yard) { y.stands("other"); y.namespace("other"); y.file("old") }, true},
		"files that are nobody's say nothing":      {func(y *yard) { y.file("other"); y.lease("third", "third") }, true},
		"another's that stands elsewhere":          {func(y *yard) { y.stands("other") }, true},
		"the pod has another sandbox":              {func(y *yard) { y.lease("new", "old"); y.up[podlink.HostName("new", "eth0")] = true }, false},
		"the pod's other sandbox is gone, too":     {func(y *yard) { y.lease("new", "old") }, true},
		"another pod's sandbox says nothing":       {func(y *yard) { y.stands("new") }, true},
		"what a killed ADD left, and no pod":       {func(y *yard) { y.remove("old@eth0"); y.pods["u-old"] = false }, false},
		"links cannot be read": {func(y *yard) {
			y.pods["u-old"] = false
			y.links = func() ([]string, error) { return nil, os.ErrPermission }
		}, true},
		"ports of the node lead there, and stay":    {func(y *yard) { y.pods["u-old"], y.errPorts = false, os.ErrPermission }, true},
		"somebody works on the attachment for long": {func(y *yard) { y.pods["u-old"] = false; y.hold(link) }, true},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			y := newYard(t)
			tt.prepare(y)
			if held := y.look(long); held != tt.kept {
				t.Errorf("the lease is there: %v, want %v", held, tt.kept)
			}
			if removed := slices.Contains(y.ports, "old"); removed == tt.kept && y.errPorts == nil {
				t.Errorf("the ports were removed: %v", removed)
			}
		})
	}
}

// stands gives another pod an attachment that stands.
func (y *yard) stands(container string) {
	y.t.Helper()
	y.lease(container, container)
	y.up[podlink.HostName(container, "eth0")] = true
}

// file puts an empty file where the namespace of a container would be.
func (y *yard) file(container string) {
	y.t.Helper()
	if err := os.WriteFile(filepath.Join(y.dir, container), nil, 0o600); err != nil {
		y.t.Fatal(err)
	}
}

// remove takes away a name of a lease.
func (y *yard) remove(name string) {
	y.t.Helper()
	if err := os.Remove(filepath.Join(y.run, "ipam", name)); err != nil {
		y.t.Fatal(err)
	}
}

// hold works on an attachment until the test ends.
func (y *yard) hold(link string) {
	y.t.Helper()
	end, err := y.locks.Begin(y.t.Context(), link)
	if err != nil {
		y.t.Fatal(err)
	}
	y.t.Cleanup(end)
}

// TestCollectWaits: nothing is collected before its time, and the time begins anew when there was a sign of life, and with every daemon.
func TestCollectWaits(t *testing.T) {
	y := newYard(t)
	link := podlink.HostName("old", "eth0")
	y.pods["u-old"] = false
	for _, begin := range []func(){
		func() {},
		func() { // a sign of life
			y.up[link] = true
			y.collect(y.t.Context())
			y.up[link] = false
		},
		func() { y.gone = nil }, // another daemon
	} {
		begin()
		if !y.look(goneFor) { // the last look is before the end of it
			t.Fatal("collected too early")
		}
	}
	if y.look(collectEvery) {
		t.Error("not collected when it was time")
	}
}

// TestCollectedAddressIsClosed: the address of a lease that is collected passes the start gate no more, also where an audit has let it through
// once more before the end, and cools down.
func TestCollectedAddressIsClosed(t *testing.T) {
	y := newYard(t)
	if err := netlink.IpsetCreate(netfilter.ReadySet(netfilter.IPv4), "hash:ip", netlink.IpsetCreateOptions{}); err != nil {
		t.Fatal(err)
	}
	addresses, err := y.leases.Held("old", "eth0")
	if err != nil || len(addresses) != 1 {
		t.Fatal(addresses, err)
	}
	open := func(a netip.Addr) {
		if err := netlink.IpsetAdd(netfilter.ReadySet(netfilter.IPv4), &netlink.IPSetEntry{IP: a.AsSlice()}); err != nil {
			t.Error(err)
		}
	}
	open(addresses[0])
	open(addresses[0].Next())
	y.removeChained = func(context.Context, ...string) error {
		open(addresses[0]) // which fails where the gate is still open
		return nil
	}
	y.pods["u-old"] = false
	if y.look(long) {
		t.Fatal("not collected")
	}
	set, err := netlink.IpsetList(netfilter.ReadySet(netfilter.IPv4))
	if err != nil {
		t.Fatal(err)
	}
	if len(set.Entries) != 1 || !set.Entries[0].IP.Equal(addresses[0].Next().AsSlice()) {
		t.Errorf("in the gate: %v, want only %v", set.Entries, addresses[0].Next())
	}
	if next := y.lease("next", "next"); next == addresses[0] {
		t.Error("the address was leased again at once")
	}
}

// TestExists: only a pod that is surely not there counts as gone.
func TestExists(t *testing.T) {
	n, s, _, pod := newStepped(t, "192.168.0.7")
	owner := func(uid string) ipam.Owner { return ipam.Owner{Namespace: pod.Namespace, Name: pod.Name, UID: uid} }
	if !n.exists(owner("other")) {
		t.Error("a pod is gone before anything was read")
	}
	step := func() {
		t.Helper()
		if err := n.step(t.Context(), true); err != nil {
			t.Fatal(err)
		}
	}
	step()
	for uid, want := range map[string]bool{pod.UID: true, "": true, "other": false} {
		if got := n.exists(owner(uid)); got != want {
			t.Errorf("a pod of the name with uid %q exists: %v, want %v", uid, got, want)
		}
	}
	finished := cluster.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Node: "node-1", Finished: true}
	s.delta.Pods[finished.Key()] = &finished
	step()
	if n.exists(owner(pod.UID)) {
		t.Error("a pod that has finished exists")
	}
	s.delta.Pods[finished.Key()] = nil
	step()
	if n.exists(owner("")) {
		t.Error("a pod that is deleted exists")
	}
}

// TestProofCollect: the real daemon ends the lease of a pod that its runtime forgot, and of no other: not of one that runs, nor of one
// that has lost its link alone.
func TestProofCollect(t *testing.T) {
	t.Parallel()
	s := running(t, "wpcollect", 1)
	node, pods := s.Nodes[0], map[string]*lab.Pod{}
	for i, name := range []string{"forgotten", "runs", "cut"} {
		pods[name] = shaped(t, node, name, 8000+i)
	}
	wantChained(t, node, 3)
	lease := func(name string) string { return filepath.Join(node.Leases(), pods[name].Addresses[0].String()) }
	began := now()
	if err := pods["forgotten"].Abandon(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := node.Run(t.Context(), "ip", "link", "delete", podlink.HostName(string(pods["cut"].UID), "eth0")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), goneFor+2*collectEvery+changePatience)
	defer cancel()
	err := lab.Until(ctx, func() error {
		if _, err := os.Lstat(lease("forgotten")); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the lease is there (%w)", err)
		}
		return nil
	})
	if took := time.Since(began); err != nil || took < goneFor {
		t.Errorf("collected after %v: %v", took, err)
	}
	for _, name := range []string{"runs", "cut"} {
		if _, err = os.Lstat(lease(name)); err != nil {
			t.Errorf("the lease of the pod %q: %v", name, err)
		}
	}
	if err = pods["runs"].Check(t.Context()); err != nil {
		t.Errorf("the pod that runs: %v", err)
	}
	wantChained(t, node, 2)
}

// A runtime that has lost its state calls no DEL, and its GC names nothing as valid: what the other plugins have made goes with the lease.
func TestCollectForRuntimeWithoutState(t *testing.T) {
	t.Parallel()
	s := running(t, "wdgc", 1)
	node := s.Nodes[0]
	for i, name := range []string{"one", "two"} {
		shaped(t, node, name, 8000+i)
	}
	wantChained(t, node, 2)
	if err := node.Collect(t.Context()); err != nil {
		t.Fatal(err)
	}
	wantChained(t, node, 0)
	if left, err := filepath.Glob(filepath.Join(node.Leases(), "*@*")); err != nil || len(left) > 0 {
		t.Errorf("leases %v, %v", left, err)
	}
}

// shaped makes a pod with a port of the node and limits to its bandwidth, by the other plugins of the conflist.
func shaped(t *testing.T, node *lab.Node, name string, port int) *lab.Pod {
	t.Helper()
	pod, err := node.AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: name, Capabilities: map[string]any{
		"portMappings": []map[string]any{{"hostPort": port, "containerPort": 80, "protocol": "tcp"}},
		"bandwidth":    map[string]any{"ingressRate": 10_000_000, "ingressBurst": 1_000_000, "egressRate": 10_000_000, "egressBurst": 1_000_000},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

// wantChained looks whether so many pods have a port of the node, and limits.
func wantChained(t *testing.T, node *lab.Node, pods int) {
	t.Helper()
	rules, err := node.Run(t.Context(), "sh", "-c", "iptables-save -t nat; ip6tables-save -t nat")
	if err != nil {
		t.Fatal(err)
	}
	links, err := node.Run(t.Context(), "ip", "-oneline", "link", "show", "type", "ifb")
	if err != nil {
		t.Fatal(err)
	}
	if ports, limits := strings.Count(rules, ":CNI-DN-"), strings.Count(links, ": bwp"); ports != 2*pods || limits != pods {
		t.Errorf("%d chains for ports and %d links for bandwidth, want those of %d pods:\n%s%s", ports, limits, pods, rules, links)
	}
}
