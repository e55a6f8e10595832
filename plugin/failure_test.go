package main

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/agentapi"
)

// refuse makes the daemon refuse one operation.
func refuse(op string, code uint, message string) func(agentapi.Request) *agentapi.Error {
	return func(req agentapi.Request) *agentapi.Error {
		if req.Op == op {
			return &agentapi.Error{Code: code, Message: message}
		}
		return nil
	}
}

// TestAddFailsWithoutTrace makes ADD fail at every step.
func TestAddFailsWithoutTrace(t *testing.T) {
	set := func(key string, value any) func(map[string]any) {
		return func(c map[string]any) { c[key] = value }
	}
	own := func(_ *testing.T, _ *node, p *pod) { p.rt.NetNS = "/proc/self/ns/net" }
	tests := map[string]struct {
		prepare func(*testing.T, *node, *pod)
		config  func(map[string]any)
		code    uint
		want    string
	}{
		"netns does not exist":   {prepare: func(_ *testing.T, _ *node, p *pod) { p.rt.NetNS = "/run/netns/none" }, code: 4, want: "CNI_NETNS"},
		"netns is a file":        {prepare: func(_ *testing.T, _ *node, p *pod) { p.rt.NetNS = "/etc/passwd" }, code: 4, want: "CNI_NETNS"},
		"netns is the node's":    {prepare: own, code: 4, want: "CNI_NETNS: /proc/self/ns/net is the node's own"},
		"no pod's identity":      {prepare: func(_ *testing.T, _ *node, p *pod) { p.rt.Args = nil }, code: 4, want: "K8S_POD_NAMESPACE"},
		"unknown CNI_ARGS":       {prepare: func(_ *testing.T, _ *node, p *pod) { p.rt.Args[0][1] = "0" }, code: 4, want: "CNI_ARGS"},
		"no ranges":              {config: set("ranges", nil), code: 7, want: "ranges is empty"},
		"range is no prefix":     {config: set("ranges", []string{"10.244.1.0"}), code: 7, want: `ranges[0]: "10.244.1.0"`},
		"range with host bits":   {config: set("ranges", []string{"10.244.1.7/24"}), code: 7, want: `ranges[0]: "10.244.1.7/24"`},
		"range of mapped IPv4":   {config: set("ranges", []string{"::ffff:10.0.0.0/120"}), code: 7, want: "ranges[0]"},
		"two ranges of a family": {config: set("ranges", []string{"10.1.0.0/24", "10.2.0.0/24"}), code: 7, want: "ranges[1]: 10.2.0.0/24"},
		"range of wrong type":    {config: set("ranges", "10.244.1.0/24"), code: 7, want: "ranges"},
		"range without address":  {config: set("ranges", []string{"10.244.1.0/31"}), code: 999, want: "10.244.1.0/31 has no address to lease"},
		"no MTU":                 {config: set("mtu", 0), code: 7, want: "mtu: 0"},
		"MTU too small for IPv6": {config: set("mtu", 1200), code: 7, want: "mtu: 1200 is not between 1280"},
		"relative run directory": {config: set("runDir", "run"), code: 7, want: `runDir "run"`},
		"bad previous result":    {config: set("prevResult", "x"), code: 7, want: "prevResult"},
		"daemon away":            {prepare: func(_ *testing.T, n *node, _ *pod) { n.stop() }, code: 11, want: "does not answer"},
		"daemon never there": {
			prepare: func(t *testing.T, n *node, _ *pod) {
				n.stop()
				if err := os.Remove(n.socket()); err != nil {
					t.Fatal(err)
				}
			}, code: 11, want: "warrend.sock",
		},
		"daemon not ready": {
			prepare: func(_ *testing.T, n *node, _ *pod) { n.daemon.answers(refuse(agentapi.OpReady, 11, "first apply")) },
			code:    11, want: "first apply",
		},
		"daemon refuses the pod": {
			prepare: func(_ *testing.T, n *node, _ *pod) {
				n.daemon.answers(refuse(agentapi.OpAttach, 11, "pod shop/web is unknown"))
			},
			code: 11, want: "pod shop/web is unknown",
		},
		"daemon fails after it opened the gate": {
			prepare: func(_ *testing.T, n *node, _ *pod) {
				n.daemon.answers(func(req agentapi.Request) *agentapi.Error {
					if req.Op != agentapi.OpAttach {
						return nil
					}
					if err := n.Do(func(ns.NetNS) error { return openGate(req.Pod.Addresses...) }); err != nil {
						return &agentapi.Error{Code: 1, Message: err.Error()}
					}
					return &agentapi.Error{Code: 11, Message: "late failure"}
				})
			},
			code: 11, want: "late failure",
		},
		"no gate":          {prepare: func(t *testing.T, n *node, _ *pod) { run(t, n, "ipset destroy WARREN-READY6") }, code: 11, want: "the start gate does not stand"},
		"interface exists": {prepare: func(t *testing.T, _ *node, p *pod) { run(t, p, "ip link add eth0 type veth peer name other") }, code: 999, want: "in the pod, eth0: file exists"},
		"range exhausted": {
			prepare: func(t *testing.T, n *node, _ *pod) {
				if _, err := n.add(n.conflist(set("ranges", []string{"10.244.1.0/30"})), n.newPod("other")); err != nil {
					t.Fatal(err)
				}
			},
			config: set("ranges", []string{"10.244.1.0/30"}), code: 11, want: "range 10.244.1.0/30 is exhausted: all 1 addresses are leased",
		},
		"lease directory is a file": {
			prepare: func(t *testing.T, n *node, _ *pod) {
				if err := os.MkdirAll(filepath.Join(n.runDir, "ipam", ".lock"), 0o700); err != nil {
					t.Fatal(err)
				}
			}, code: 999, want: "locking leases",
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := n.newPod("web")
			if tt.prepare != nil {
				tt.prepare(t, n, p)
			}
			change := tt.config
			if change == nil {
				change = func(map[string]any) {}
			}
			var before string
			gate := !strings.HasPrefix(name, "no gate")
			if gate {
				before = n.state(p)
			}
			out, stderr, err := n.exec(p, "ADD", change)
			if err == nil {
				t.Fatalf("ADD succeeded: %s", out)
			}
			cniErr := &types.Error{}
			if err = json.Unmarshal([]byte(out), cniErr); err != nil || stderr != "" {
				t.Fatalf("not one CNI error on stdout: %q, %q", out, stderr)
			}
			wantCode(t, cniErr, tt.code, tt.want)
			if gate {
				n.unchanged(before, p)
			} else if left := run(t, n, "ip -br link show type veth; ls "+n.runDir+"/ipam"); left != "" {
				t.Errorf("left:\n%s", left)
			}
		})
	}
}

// TestKilledAdd: what an ADD leaves that was killed before it returned goes with DEL, and with GC.
func TestKilledAdd(t *testing.T) {
	for _, command := range []string{"DEL", "GC"} {
		t.Run(command, func(t *testing.T) {
			n := newNode(t)
			p := n.newPod("web")
			before := n.state(p)
			n.daemon.answers(func(req agentapi.Request) *agentapi.Error {
				if req.Op == agentapi.OpAttach {
					run(t, n, "kill -KILL $(ip netns pids "+filepath.Base(n.Path())+" | xargs -r ps -o pid=,comm= -p | awk '$2 == \"warren\" {print $1}')")
				}
				return nil
			})
			if out, _, err := n.exec(p, "ADD"); err == nil || out != "" {
				t.Fatalf("the plugin was not killed: %v, %q", err, out)
			}
			if n.state(p) == before {
				t.Fatal("the killed ADD left nothing to clean up")
			}
			out, stderr, err := n.exec(p, command, func(c map[string]any) { c["cni.dev/valid-attachments"] = []any{} })
			if err != nil || out != "" || stderr != "" {
				t.Errorf("%s: %v\n%s%s", command, err, out, stderr)
			}
			n.unchanged(before, p)
		})
	}
}

// TestSecondAddLeavesTheFirst: an ADD without a DEL before must not undo what the first made.
func TestSecondAddLeavesTheFirst(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	n.mustAdd(p)
	before := n.state(p)
	_, err := n.add(n.conflist(), p)
	wantCode(t, err, types.ErrInternal, "already has a lease")
	n.unchanged(before, p)
}

// TestStaleAddressIsClosed: an address that passes the gate from its last pod on must not when the next one is wired.
func TestStaleAddressIsClosed(t *testing.T) {
	n := newNode(t)
	if err := openGate(netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00:10:244:1::2"), netip.MustParseAddr("10.244.1.9")); err != nil {
		t.Fatal(err)
	}
	var openAtAttach []string
	n.daemon.answers(func(req agentapi.Request) *agentapi.Error {
		if req.Op == agentapi.OpAttach {
			openAtAttach = n.open()
		}
		return nil
	})
	n.mustAdd(n.newPod("web"))
	if diff := cmp.Diff([]string{"10.244.1.9"}, openAtAttach); diff != "" {
		t.Errorf("open when the daemon was asked (-want +got):\n%s", diff)
	}
}

func TestCheck(t *testing.T) {
	check := func(n *node, p *pod) error { return n.cni.CheckNetworkList(context.Background(), n.conflist(), &p.rt) }
	tests := map[string]struct {
		corrupt func(*testing.T, *node, *pod)
		code    uint
		want    string
	}{
		"link": {func(t *testing.T, _ *node, p *pod) { run(t, p, "ip route del default") }, 999, "route 0.0.0.0/0 is missing"},
		"lease": {
			func(t *testing.T, n *node, _ *pod) { run(t, n, "rm "+n.runDir+"/ipam/*") }, 999, "has no lease",
		},
		"other addresses": {
			func(t *testing.T, n *node, p *pod) {
				// Another lease and link for the same attachment, of which the runtime knows nothing.
				out, _, err := n.exec(p, "DEL")
				if err != nil {
					t.Fatal(err, out)
				}
				if out, _, err = n.exec(p, "ADD"); err != nil {
					t.Fatal(err, out)
				}
			}, 999, "prevResult has no address 10.244.1.3",
		},
		"gate": {
			func(_ *testing.T, n *node, _ *pod) {
				n.daemon.answers(refuse(agentapi.OpCheck, 999, "10.244.1.2 may not pass"))
			}, 999, "10.244.1.2 may not pass",
		},
		"daemon away": {func(_ *testing.T, n *node, _ *pod) { n.stop() }, 11, "does not answer"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := n.newPod("web")
			n.mustAdd(p)
			if err := check(n, p); err != nil {
				t.Fatalf("before the corruption: %v", err)
			}
			tt.corrupt(t, n, p)
			wantCode(t, check(n, p), tt.code, tt.want)
		})
	}
}

func TestCheckWithoutPreviousResult(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	n.mustAdd(p)
	if out, _, err := n.exec(p, "CHECK"); err == nil || !strings.Contains(out, `"code": 7`) || !strings.Contains(out, "prevResult is missing") {
		t.Errorf("got %v: %s", err, out)
	}
}

func TestStatus(t *testing.T) {
	n := newNode(t)
	list := n.conflist()
	status := func() error { return n.cni.GetStatusNetworkList(context.Background(), list) }
	if err := status(); err != nil {
		t.Errorf("ready: %v", err)
	}
	n.daemon.answers(refuse(agentapi.OpReady, 11, "no podCIDR"))
	wantCode(t, status(), types.ErrPluginNotAvailable, "no podCIDR")
	n.daemon.answers(refuse(agentapi.OpReady, types.ErrLimitedConnectivity, "no tunnel"))
	wantCode(t, status(), types.ErrLimitedConnectivity, "no tunnel")
	n.stop()
	wantCode(t, status(), types.ErrPluginNotAvailable, "does not answer")
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

	// A file that nobody can read keeps GC from nothing else.
	junk := filepath.Join(n.runDir, "ipam", "junk")
	if err := os.WriteFile(junk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	n.cni = libcni.NewCNIConfigWithCacheDir([]string{binaries}, t.TempDir(), executor()) // so that libcni itself deletes nothing
	list := n.conflist()
	args := &libcni.GCArgs{ValidAttachments: []types.GCAttachment{{ContainerID: "c-kept", IfName: "eth0"}, {ContainerID: "c-never", IfName: "eth0"}}}
	err := n.cni.GCNetworkList(context.Background(), list, args)
	if err == nil || !strings.Contains(err.Error(), junk) {
		t.Errorf("GC: %v, want an error that names %s", err, junk)
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
