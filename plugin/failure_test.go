package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

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
		"lock is a directory that cannot be set aside": {
			prepare: func(t *testing.T, n *node, _ *pod) {
				lock := filepath.Join(n.runDir, "ipam", ".lock")
				if err := os.MkdirAll(lock, 0o700); err != nil {
					t.Fatal(err)
				}
				pin(t, lock)
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
					run(t, n, fmt.Sprintf("pkill -KILL -P %d -x warren", os.Getpid()))
				}
				return nil
			})
			if out, _, err := n.exec(p, "ADD"); err == nil || out != "" {
				t.Fatalf("the plugin was not killed: %v, %q", err, out)
			}
			if n.state(p) == before {
				t.Fatal("the killed ADD left nothing to clean up")
			}
			out, stderr, err := n.exec(p, command, nothingValid)
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
