package main

import (
	"fmt"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/warren-cni/warren/pkg/cniconf"
)

// TestConflistInParallel drives the conflist that the daemon writes as a runtime does, all its plugins and all verbs, for 20 pods at
// once, beside a first one.
func TestConflistInParallel(t *testing.T) {
	n := newNode(t)
	data, err := cniconf.Render(nil, cniconf.Params{
		RunDir: n.runDir, MTU: 1440,
		Ranges: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")},
	})
	if err != nil {
		t.Fatal(err)
	}
	list, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Plugins) < 3 {
		t.Fatalf("the conflist chains nothing: %s", data)
	}
	const pods = 21
	var all []*pod
	for i := range pods {
		p := n.newPod(fmt.Sprintf("p%d", i))
		p.rt.CapabilityArgs = map[string]any{
			"portMappings": []map[string]any{{"hostPort": 8000 + i, "containerPort": 80, "protocol": "tcp"}},
			"bandwidth":    map[string]any{"ingressRate": 10_000_000, "ingressBurst": 1_000_000, "egressRate": 10_000_000, "egressBurst": 1_000_000},
		}
		all = append(all, p)
	}
	before := n.state()
	ctx := t.Context()
	status := func(*pod) error { return n.cni.GetStatusNetworkList(ctx, list) }
	check := func(p *pod) error { return n.cni.CheckNetworkList(ctx, list, &p.rt) }
	del := func(p *pod) error { return n.cni.DelNetworkList(ctx, list, &p.rt) }

	n.atOnce(all, status)
	add := func(p *pod) error {
		result, err := n.cni.AddNetworkList(ctx, list, &p.rt)
		if err != nil {
			return err
		}
		added, err := current.NewResultFromResult(result)
		if err != nil || len(added.IPs) != 2 || len(added.Interfaces) < 3 { // bandwidth adds its own
			return fmt.Errorf("result %v, %w", result, err)
		}
		return nil
	}
	n.atOnce(all[:1], add) // alone: the first one's portmap makes chains for all, and fails where another does so, too
	n.atOnce(all[1:], add)
	if got := len(slices.Compact(n.open())); got != 2*pods {
		t.Errorf("%d addresses are open, want %d", got, 2*pods)
	}
	if rules := run(t, n, "iptables-save -t nat"); strings.Count(rules, ":80\n") < pods {
		t.Errorf("portmap made no rules:\n%s", rules)
	}
	n.atOnce(all, check)
	n.atOnce(all, func(p *pod) error {
		if p == all[0] {
			run(t, p, "ip route del default")
		}
		err := check(p)
		if p == all[0] {
			wantCode(t, err, types.ErrInternal, "route 0.0.0.0/0 is missing")
			return nil
		}
		return err
	})

	kept := all[:pods/2]
	args := &libcni.GCArgs{}
	for _, p := range kept {
		args.ValidAttachments = append(args.ValidAttachments, types.GCAttachment{ContainerID: p.rt.ContainerID, IfName: p.rt.IfName})
	}
	if err = n.cni.GCNetworkList(ctx, list, args); err != nil {
		t.Errorf("GC: %v", err)
	}
	if got := len(n.open()); got != 2*len(kept) {
		t.Errorf("%d addresses are open after GC, want %d", got, 2*len(kept))
	}
	n.atOnce(kept[1:], check)
	n.atOnce(all, status)
	shapers := func() int { return strings.Count(run(t, n, "ip -oneline link show type ifb"), "\n") }
	if got := shapers(); got != len(kept) {
		t.Errorf("bandwidth has %d links, want %d", got, len(kept))
	}
	for i, p := range kept { // as the daemon does where no DEL comes
		if err = cniconf.RemoveShapers(list.Name, p.rt.ContainerID); err != nil || shapers() != len(kept)-i-1 {
			t.Errorf("%d of bandwidth's links are left, %v", shapers(), err)
		}
	}
	n.atOnce(all, del) // also of what GC took away
	n.atOnce(all, del)
	run(t, n, "iptables -t nat -F; iptables -t nat -X; ip6tables -t nat -F; ip6tables -t nat -X") // what portmap keeps
	n.unchanged(before)
}

// atOnce does something for all pods at the same time, on the node.
func (n *node) atOnce(pods []*pod, do func(*pod) error) {
	n.t.Helper()
	var wg sync.WaitGroup
	for _, p := range pods {
		wg.Go(func() {
			runtime.LockOSThread() // for good: the thread stays on the node
			if err := n.Set(); err != nil {
				n.t.Error(err)
				return
			}
			if err := do(p); err != nil {
				n.t.Errorf("%s: %v", p.rt.ContainerID, err)
			}
		})
	}
	wg.Wait()
}
