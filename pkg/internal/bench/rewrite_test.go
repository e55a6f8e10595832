package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
	"github.com/warren-cni/warren/pkg/testnode"
)

// rewrite is what a controller does that saves and restores everything at each event: it works everything out anew, reads the rules
// and sets of the kernel, and writes all of them. It runs in the network namespace of the calling thread.
func rewrite(ctx context.Context, s cluster.Snapshot) error {
	rules, _ := policy.Compile(s)
	if err := execute(ctx, "", "ipset", "save"); err != nil {
		return err
	}
	var sets strings.Builder
	for _, f := range netfilter.Families {
		writeSets(&sets, f, rules.Of(f).Sets)
	}
	if err := execute(ctx, sets.String(), "ipset", "restore"); err != nil {
		return err
	}
	for _, f := range netfilter.Families {
		program := map[netfilter.Family]string{netfilter.IPv4: "iptables", netfilter.IPv6: "ip6tables"}[f]
		if err := execute(ctx, "", program+"-save"); err != nil {
			return err
		}
		text := netfilter.Delta{Table: "mangle", Write: rules.Of(f).Chains}.Render()
		if err := execute(ctx, text, program+"-restore", "-w", "10"); err != nil {
			return err
		}
	}
	return nil
}

// writeSets writes sets as input of ipset: each is filled under another name and takes the old one's place.
func writeSets(w *strings.Builder, f netfilter.Family, sets []netfilter.Set) {
	const draft = "draft"
	inet := map[netfilter.Family]string{netfilter.IPv4: "inet", netfilter.IPv6: "inet6"}[f]
	for _, s := range sets {
		for _, name := range []string{s.Name, draft} {
			fmt.Fprintf(w, "create -exist %s %s family %s\n", name, s.Type, inet)
		}
		for _, e := range s.Entries {
			fmt.Fprintf(w, "add %s %s\n", draft, e)
		}
		fmt.Fprintf(w, "swap %s %s\ndestroy %s\n", s.Name, draft, draft)
	}
}

// execute runs a program of this machine with text as its input, and reads what it writes.
func execute(ctx context.Context, input, program string, args ...string) error {
	cmd := exec.CommandContext(ctx, program, args...)
	var stdout, stderr strings.Builder
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(input), &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("running %s: %w: %s", program, err, stderr.String())
	}
	return nil
}

// rewriter follows the API server, and rewrites everything in a network namespace of its own at each event.
type rewriter struct {
	*apiStage
	mu sync.Mutex
	// written is when it had written rules for the policy as it is in last.
	last    string
	written time.Time
}

// startRewriter starts one for the node of a pod, until the benchmark ends.
func startRewriter(s *apiStage, local *lab.Pod) *rewriter {
	s.b.Helper()
	source, err := kube.NewAPI(s.config, local.Node.Name, slog.New(slog.DiscardHandler))
	if err != nil {
		s.b.Fatal(err)
	}
	r := &rewriter{apiStage: s}
	node := testnode.New(s.b)
	ctx, stop := context.WithCancel(s.b.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = source.Run(ctx) })
	running.Go(func() {
		attachments := []cluster.Attachment{{
			ContainerID: string(local.UID), Interface: "eth0", Namespace: namespace, Name: local.Name, UID: string(local.UID), Addresses: local.Addresses,
		}}
		err := node.Do(func(ns.NetNS) error { return r.run(ctx, source, attachments) })
		if err != nil && !errors.Is(ctx.Err(), context.Canceled) {
			s.b.Error(err)
		}
	})
	s.b.Cleanup(func() {
		stop()
		running.Wait()
	})
	if err = source.WaitForSync(s.b.Context()); err != nil {
		s.b.Fatal(err)
	}
	return r
}

// run rewrites everything at each event.
func (r *rewriter) run(ctx context.Context, source *kube.API, local []cluster.Attachment) error {
	if err := source.WaitForSync(ctx); err != nil {
		return err
	}
	state := cluster.NewState(r.Nodes[0].Name)
	for {
		state.Update(source.Changes(), cluster.Attachments{All: true, List: local})
		snapshot := state.Snapshot()
		if err := rewrite(ctx, snapshot); err != nil {
			return err
		}
		for _, p := range snapshot.Policies {
			if p.Name == flipped {
				r.wrote(p.IngressRules[0].Peers[0].Pods.String())
			}
		}
		select {
		case <-source.Changed():
		case <-ctx.Done():
			return nil
		}
	}
}

// wrote notes that rules stand for the policy that lets in what a selector chooses.
func (r *rewriter) wrote(selector string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.last != selector {
		r.last, r.written = selector, time.Now() //nolint:forbidigo // a measurement
	}
}

// when waits until the rules of a policy that lets an app in are written, and returns when they were first.
func (r *rewriter) when(who string) (at time.Time) {
	r.b.Helper()
	r.eventually(func() error {
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.last != "app="+who {
			return fmt.Errorf("the rules are those for %s, not for %s", r.last, who)
		}
		at = r.written
		return nil
	})
	return at
}
