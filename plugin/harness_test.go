package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/testnode"
)

// binaries is the directory of the real plugins and of cnitool.
var binaries string

func TestMain(m *testing.M) {
	code, err := buildAndRun(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

// buildAndRun builds what the tests run, and runs them.
func buildAndRun(m *testing.M) (int, error) {
	dir, err := os.MkdirTemp("", "warren-plugin")
	if err != nil {
		return 0, err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	binaries = dir
	runtime.SetDefaultGOMAXPROCS() // the tests are many things at a time
	for name, pkg := range map[string]string{
		"warren":    ".",
		"cnitool":   "github.com/containernetworking/cni/cnitool",
		"portmap":   "github.com/containernetworking/plugins/plugins/meta/portmap",
		"bandwidth": "github.com/containernetworking/plugins/plugins/meta/bandwidth",
	} {
		build := exec.Command("go", "build", "-o", filepath.Join(dir, name), pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, buildErr := build.CombinedOutput(); buildErr != nil {
			return 0, fmt.Errorf("building %s: %w\n%s", name, buildErr, out)
		}
	}
	return m.Run(), nil
}

// node is a network namespace with a run directory, the start gate's sets, and a stand-in for the daemon.
type node struct {
	ns.NetNS
	t      *testing.T
	runDir string
	cni    *libcni.CNIConfig
	daemon *daemon
	stop   func()
	// under is the command under which exec runs the plugin.
	under []string
}

// newNode enters a new node whose daemon is ready.
func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{NetNS: testnode.Enter(t), t: t, runDir: t.TempDir()}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{binaries}, t.TempDir(), executor())
	for f, family := range map[netfilter.Family]uint8{netfilter.IPv4: unix.AF_INET, netfilter.IPv6: unix.AF_INET6} {
		if err := netlink.IpsetCreate(netfilter.ReadySet(f), "hash:ip", netlink.IpsetCreateOptions{Family: family}); err != nil {
			t.Fatal(err)
		}
	}
	n.startDaemon()
	return n
}

// executor runs plugins; libcni's own is made on first use, which is not safe where several goroutines use it.
func executor() invoke.Exec {
	return &invoke.DefaultExec{RawExec: &invoke.RawExec{Stderr: os.Stderr}}
}

// startDaemon starts the stand-in, and returns when it answers.
func (n *node) startDaemon() {
	n.t.Helper()
	n.daemon = &daemon{node: n.NetNS}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- agentapi.Serve(ctx, n.socket(), n.daemon.handle) }()
	n.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Error(err)
		}
	})
	n.t.Cleanup(n.stop)
	for {
		_, err := agentapi.Call(n.t.Context(), n.socket(), agentapi.Request{Op: "test"})
		if err == nil {
			return
		}
		if n.t.Context().Err() != nil {
			n.t.Fatal(err)
		}
		runtime.Gosched()
	}
}

func (n *node) socket() string { return filepath.Join(n.runDir, "warrend.sock") }

// daemon stands in for warrend: it opens the gate for every pod and deletes links at once, or answers as a test says.
type daemon struct {
	node ns.NetNS
	late atomic.Bool // leaves links for later

	mu       sync.Mutex
	requests []agentapi.Request
	answer   func(agentapi.Request) *agentapi.Error
	// limited is what it says that pods that run lack.
	limited string
}

func (d *daemon) handle(_ context.Context, req agentapi.Request) agentapi.Response {
	d.mu.Lock()
	d.requests = append(d.requests, req)
	answer, says := d.answer, d.limited
	d.mu.Unlock() // a GC is answered beside an ADD
	if answer != nil {
		if refusal := answer(req); refusal != nil {
			return agentapi.Response{Error: refusal}
		}
	}
	err := d.node.Do(func(ns.NetNS) error {
		switch req.Op {
		case agentapi.OpAttach:
			return openGate(req.Pod.Addresses...)
		case agentapi.OpReleased:
			if d.late.Load() {
				return nil
			}
			return podlink.Sweep()
		default:
			return nil
		}
	})
	if err != nil {
		return agentapi.Response{Error: &agentapi.Error{Code: 999, Message: err.Error()}}
	}
	return agentapi.Response{Limited: says}
}

// answers sets what the daemon refuses.
func (d *daemon) answers(answer func(agentapi.Request) *agentapi.Error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.answer = answer
}

// openGate lets addresses pass the start gate.
func openGate(addresses ...netip.Addr) error {
	for _, a := range addresses {
		entry := &netlink.IPSetEntry{IP: a.AsSlice(), Replace: true}
		if err := netlink.IpsetAdd(netfilter.ReadySet(netfilter.FamilyOf(a)), entry); err != nil {
			return err
		}
	}
	return nil
}

// open returns what may pass the start gate.
func (n *node) open() []string {
	n.t.Helper()
	var open []string
	err := n.Do(func(ns.NetNS) error {
		for _, f := range netfilter.Families {
			set, err := netlink.IpsetList(netfilter.ReadySet(f))
			if err != nil {
				return err
			}
			for _, e := range set.Entries {
				open = append(open, e.IP.String())
			}
		}
		return nil
	})
	if err != nil {
		n.t.Fatal(err)
	}
	slices.Sort(open)
	return open
}

// remembered returns the addresses that were released and whose connections were not ended yet.
func (n *node) remembered() (remembered []string) {
	n.t.Helper()
	leases, err := ipam.Open(filepath.Join(n.runDir, "ipam"))
	if err != nil {
		n.t.Fatal(err)
	}
	_ = leases.Forget(func(addresses []netip.Addr) error {
		for _, a := range addresses {
			remembered = append(remembered, a.String())
		}
		return errors.New("only asked")
	})
	return remembered
}

// conflist returns the network's configuration, changed as the test wants it.
func (n *node) conflist(change ...func(map[string]any)) *libcni.NetworkConfigList {
	n.t.Helper()
	list, err := libcni.NetworkConfFromBytes(n.conflistJSON(change...))
	if err != nil {
		n.t.Fatal(err)
	}
	return list
}

// conflistJSON is the conflist's text; changes are made to the plugin's own entry.
func (n *node) conflistJSON(change ...func(map[string]any)) []byte {
	n.t.Helper()
	plugin := map[string]any{
		"type": "warren", "runDir": n.runDir, "ranges": []string{"10.244.1.0/24", "fd00:10:244:1::/64"}, "mtu": 1440,
	}
	for _, c := range change {
		c(plugin)
	}
	list := map[string]any{
		"cniVersion": "1.0.0", "cniVersions": []string{"1.0.0", "1.1.0"}, "name": "warren", "plugins": []any{plugin},
	}
	data, err := json.Marshal(list)
	if err != nil {
		n.t.Fatal(err)
	}
	return data
}

// pod is a namespace and what the runtime calls it.
type pod struct {
	ns.NetNS
	rt libcni.RuntimeConf
}

// newPod makes a pod's namespace.
func (n *node) newPod(name string) *pod {
	n.t.Helper()
	space := testnode.New(n.t)
	return &pod{NetNS: space, rt: libcni.RuntimeConf{
		ContainerID: "c-" + name, NetNS: space.Path(), IfName: "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"}, {"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", name}, {"K8S_POD_UID", "uid-" + name}, {"OTHER", "x"},
		},
	}}
}

// add runs ADD and returns its result.
func (n *node) add(list *libcni.NetworkConfigList, p *pod) (*current.Result, error) {
	result, err := n.cni.AddNetworkList(context.Background(), list, &p.rt)
	if err != nil {
		return nil, err
	}
	return current.NewResultFromResult(result)
}

// mustAdd runs ADD, which has to succeed.
func (n *node) mustAdd(p *pod) *current.Result {
	n.t.Helper()
	result, err := n.add(n.conflist(), p)
	if err != nil {
		n.t.Fatal(err)
	}
	return result
}

// del runs DEL.
func (n *node) del(p *pod) error {
	return n.cni.DelNetworkList(context.Background(), n.conflist(), &p.rt)
}

// run runs a shell command in a namespace and returns its output.
func run(t *testing.T, in ns.NetNS, command string) string {
	t.Helper()
	var out []byte
	err := in.Do(func(ns.NetNS) (err error) {
		out, err = exec.Command("sh", "-ec", command).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// state is everything that an attachment can leave behind on the node and in pods.
func (n *node) state(pods ...*pod) string {
	n.t.Helper()
	var b strings.Builder
	entries, err := os.ReadDir(filepath.Join(n.runDir, "ipam"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		n.t.Fatal(err)
	}
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), ".") { // those are nobody's leases
			fmt.Fprintln(&b, "lease", e.Name())
		}
	}
	fmt.Fprintln(&b, "open", n.open())
	spaces := []ns.NetNS{n.NetNS}
	for _, p := range pods {
		spaces = append(spaces, p.NetNS)
	}
	for _, space := range spaces {
		b.WriteString(run(n.t, space,
			// Without what the kernel does by itself, and later: operational state and link-local addresses; and without what ip says of
			// namespaces of others that it looks at while they come and go.
			"ip -o link 2>/dev/null | sed 's/<[^>]*>//; s/state [A-Z]*//'; ip -o addr show scope global; ip route show table all | grep -v fe80::; ip neigh; "+
				"iptables-save | grep '^-A' || true; ip6tables-save | grep '^-A' || true"))
	}
	return b.String()
}

// unchanged fails the test when the state differs from the one before.
func (n *node) unchanged(before string, pods ...*pod) {
	n.t.Helper()
	if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(n.state(pods...), "\n")); diff != "" {
		n.t.Errorf("state (-before +after):\n%s", diff)
	}
}

// wantCode fails the test when the error is not a CNI error with that code and text.
func wantCode(t *testing.T, err error, code uint, text string) {
	t.Helper()
	var cniErr *types.Error
	if !errors.As(err, &cniErr) || cniErr.Code != code || !strings.Contains(cniErr.Msg, text) {
		t.Errorf("got %#v (%v), want code %d and %q", err, err, code, text)
	}
}
