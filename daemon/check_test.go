package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// webPolicy lets the clients in to the pods of an app, and these out to the clients.
func webPolicy(app string) networkingv1.NetworkPolicy {
	clients := []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "client"}}}}
	return networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: app},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": app}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress, networkingv1.PolicyTypeEgress},
			Ingress:     []networkingv1.NetworkPolicyIngressRule{{From: clients}},
			Egress:      []networkingv1.NetworkPolicyEgressRule{{To: clients}},
		},
	}
}

// TestCheckReadsTheKernel: CHECK finds each single thing that somebody changed in the kernel and that decides about the pod, before
// the daemon repairs it, and names it. What concerns other pods only is theirs.
func TestCheckReadsTheKernel(t *testing.T) {
	s := running(t, "wdcheck", 1)
	s.write("web", webPolicy("web"))
	client, web := s.pod(0, "client"), s.pod(0, "web")
	s.reaches(client, web)
	saved := t.TempDir()
	s.shell(fmt.Sprintf("iptables-save > %s/4; ip6tables-save > %s/6", saved, saved))
	restore := fmt.Sprintf("iptables-restore < %s/4; ip6tables-restore < %s/6", saved, saved)
	in := netfilter.Name("I", "shop/web")
	peers := func(program string) string {
		return strings.TrimSpace(s.shell(program + " -t mangle -S " + in + " | grep -o 'match-set WARREN-[^ ]*' | head -1 | cut -d' ' -f2"))
	}
	words := strings.NewReplacer(
		"$web4", web.Addresses[0].String(), "$web6", web.Addresses[1].String(),
		"$client4", client.Addresses[0].String(), "$client6", client.Addresses[1].String(),
		"$in", in, "$out", netfilter.Name("E", "shop/web"), "$peers4", peers("iptables"), "$peers6", peers("ip6tables"),
	)
	for _, c := range []struct{ corrupt, repair, want string }{
		{"ipset del WARREN-READY4 $web4", "ipset -exist add WARREN-READY4 $web4", "set WARREN-READY4 lacks members: $web4"},
		{"ipset del WARREN-READY6 $web6", "ipset -exist add WARREN-READY6 $web6", "set WARREN-READY6 lacks members: $web6"},
		{"ipset del WARREN-ISOLATED4 $web4", "ipset -exist add WARREN-ISOLATED4 $web4", "set WARREN-ISOLATED4 lacks members: $web4"},
		{"ipset del WARREN-ISOLATED6 $web6", "ipset -exist add WARREN-ISOLATED6 $web6", "set WARREN-ISOLATED6 lacks members: $web6"},
		{"ipset flush $peers4", "ipset -exist add $peers4 $client4", "set $peers4 lacks members: $client4"},
		{"ipset flush $peers6", "ipset -exist add $peers6 $client6", "set $peers6 lacks members: $client6"},
		{"ipset add $peers4 10.244.1.99", "ipset -exist del $peers4 10.244.1.99", "set $peers4 has members that it should not have: 10.244.1.99"},
		{"iptables -t mangle -F $in", restore, "chain $in in mangle table (ipv4) has other rules"},
		{"ip6tables -t mangle -F $in", restore, "chain $in in mangle table (ipv6) has other rules"},
		{"iptables -t mangle -I $out -j RETURN", restore, "chain $out in mangle table (ipv4) has other rules"},
		{"ip6tables -t mangle -D WARREN-POLICY 1", restore, "chain WARREN-POLICY in mangle table (ipv6) has other rules"},
		{"iptables -t mangle -F FORWARD", restore, "chain FORWARD in mangle table (ipv4) does not lead to: WARREN-FORWARD"},
		{"ip6tables -t mangle -F FORWARD", restore, "chain FORWARD in mangle table (ipv6) does not lead to: WARREN-FORWARD"},
		{"iptables -t mangle -I FORWARD -j ACCEPT", restore, "chain FORWARD in mangle table (ipv4) has a rule ahead of WARREN-FORWARD"},
		{"iptables -t mangle -F WARREN-GUARD", restore, "chain WARREN-GUARD in mangle table (ipv4) has other rules"},
		{"ip6tables -t mangle -F POSTROUTING", restore, "chain POSTROUTING in mangle table (ipv6) does not lead to: WARREN-GUARD"},
		{"iptables -F FORWARD", restore, "chain FORWARD in filter table (ipv4) does not lead to: WARREN-ACCEPT"},
		{"ip6tables -F FORWARD", restore, "chain FORWARD in filter table (ipv6) does not lead to: WARREN-BELT"},
		{"iptables -F WARREN-BELT", restore, "chain WARREN-BELT in filter table (ipv4) has other rules"},
		{"iptables -t raw -F WARREN-RAW", restore, "chain WARREN-RAW in raw table (ipv4) has other rules"},
		{"ip6tables -t raw -F PREROUTING", restore, "chain PREROUTING in raw table (ipv6) does not lead to: WARREN-RAW"},
		{"iptables -t nat -F POSTROUTING", restore, "chain POSTROUTING in nat table (ipv4) does not lead to: WARREN-NAT"},
	} {
		corrupt, want := words.Replace(c.corrupt), words.Replace(c.want)
		s.checkFinds(web, corrupt, want)
		s.shell(words.Replace(c.repair))
		s.eventually(func() error { return web.Check(t.Context()) })
	}
	// Of another pod.
	corrupt, want := words.Replace("ipset del WARREN-READY4 $client4"), words.Replace("set WARREN-READY4 lacks members: $client4")
	s.checkFinds(client, corrupt, want)
	if err := web.Check(t.Context()); err != nil {
		t.Errorf("what another pod lacks: %v", err)
	}
}

// shell runs a command on the first node and returns what it writes.
func (s *stage) shell(command string) string {
	s.t.Helper()
	out, err := s.Nodes[0].Run(s.t.Context(), "sh", "-ec", command)
	if err != nil {
		s.t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return out
}

// checkFinds demands that CHECK of a pod finds what a command corrupts. An audit may come first, so it has more than one chance.
func (s *stage) checkFinds(pod *lab.Pod, corrupt, want string) {
	s.t.Helper()
	var err error
	for range 3 {
		s.shell(corrupt)
		if err = pod.Check(s.t.Context()); err != nil && strings.Contains(err.Error(), want) {
			return
		}
	}
	s.t.Errorf("after %q: %v, want %q", corrupt, err, want)
}

// TestCheckWhileRulesChange: what a step is just about to write is no corruption.
func TestCheckWhileRulesChange(t *testing.T) {
	s := running(t, "wdchurn", 1)
	s.write("web", webPolicy("web"))
	web := s.pod(0, "web")
	ctx, stop := context.WithCancel(t.Context())
	changed := make(chan int)
	go func() {
		n := 0
		for ; ctx.Err() == nil; n++ {
			policy := webPolicy("web")
			if n%2 == 0 {
				policy.Spec.Egress = nil
			}
			if err := s.Write("web", policy); err != nil {
				t.Error(err)
				break
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-ctx.Done():
			}
		}
		changed <- n
	}()
	for range 20 {
		if err := web.Check(t.Context()); err != nil {
			t.Errorf("a healthy pod: %v", err)
		}
	}
	stop()
	if n := <-changed; n < 5 {
		t.Errorf("the policy changed only %d times", n)
	}
}

// brokenTunnel is a tunnel that cannot be made.
type brokenTunnel struct{ tunnel }

func (brokenTunnel) Apply(context.Context, mesh.Config, wgdevice.Key) (wgdevice.Changes, error) {
	return wgdevice.Changes{}, wgdevice.ErrNoTunnel
}

func (brokenTunnel) Patch(context.Context, mesh.Change, wgdevice.Key) (wgdevice.Changes, error) {
	return wgdevice.Changes{}, wgdevice.ErrNoTunnel
}

// TestReadyTellsWhatPodsLack: new pods can be attached while the tunnel or the enforcement is broken, but it is said.
func TestReadyTellsWhatPodsLack(t *testing.T) {
	n, _, m, _ := newStepped(t, "192.168.0.7")
	ask := func() agentapi.Response { return n.handle(t.Context(), agentapi.Request{Op: agentapi.OpReady}) }
	if answer := ask(); answer.Error == nil || answer.Error.Code != types.ErrTryAgainLater || !strings.Contains(answer.Error.Message, "not read the cluster's objects yet") {
		t.Errorf("before the first step: %+v", answer)
	}
	step := func(what, want string) {
		t.Helper()
		err := n.step(t.Context(), true)
		answer := ask()
		if (err != nil) != (want != "") || answer.Error != nil || (answer.Limited == "") != (want == "") || !strings.Contains(answer.Limited, want) {
			t.Errorf("%s: step %v, answer %+v, want %q", what, err, answer, want)
		}
	}
	step("all is well", "")
	m.busy.Store(true)
	step("the packet filter cannot be written", "FirewallApplyFailed")
	m.busy.Store(false)
	step("it can again", "")
	good := n.follower
	n.follower = newFollower(brokenTunnel{}, n.clock, n.renewMesh, n.log)
	step("there is no tunnel", "NoTunnel")
	n.follower = good
	step("there is one again", "")
}

// TestLimits: what is broken for every pod makes a node NotReady; what one user's object does never may.
func TestLimits(t *testing.T) {
	for code, want := range map[string]bool{
		"FirewallApplyFailed": true, "MeshApplyFailed": true, "NoTunnel": true, "ForwardingOff": true, "ClusterCIDRHoldsNode": true, "ClusterCIDRHoldsServer": true,
		codeNotApplied: false, "LeaseUnreadable": false, "PublishFailed": false, "PolicyInvalid": false, "PodCIDRConflict": false,
		"PodsNotSwept": false, // STATUS sees by the leases when no pod can be attached any more for it
	} {
		got := limited([]cluster.Problem{{Code: "Other"}, {Code: code, Object: "x", Message: "m", Remedy: "r"}})
		if (got != "") != want || want && got != code+": x: m: r" {
			t.Errorf("%s: %q", code, got)
		}
	}
}

// TestStatusOfABrokenNode asks the real plugin, before and after the kernel refuses what the daemon wants, and once the daemon is away.
func TestStatusOfABrokenNode(t *testing.T) {
	s, refused := refusingStage(t, "wdnotready")
	web := s.pod(0, "web")
	s.eventually(func() error { return s.Nodes[0].Readiness(t.Context()) })
	if err := os.WriteFile(refused, []byte("WARREN-FORWARD\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	s.shell("iptables -t mangle -F WARREN-FORWARD; ip6tables -t mangle -F WARREN-FORWARD") // the next audit has to write
	s.notReady(types.ErrLimitedConnectivity, "FirewallApplyFailed")
	if err := os.Remove(refused); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error { return s.Nodes[0].Readiness(t.Context()) })
	if err := web.Check(t.Context()); err != nil {
		t.Errorf("the pod after the repair: %v", err)
	}
	if err := s.daemons[0].Kill(); err != nil {
		t.Fatal(err)
	}
	s.notReady(types.ErrPluginNotAvailable, "does not answer")
}

// notReady waits until STATUS of the first node's plugin fails with a code and a text.
func (s *stage) notReady(code uint, text string) {
	s.t.Helper()
	s.eventually(func() error {
		err := s.Nodes[0].Readiness(s.t.Context())
		if answer, ok := errors.AsType[*types.Error](err); !ok || answer.Code != code || !strings.Contains(answer.Msg, text) {
			return fmt.Errorf("STATUS: %w, want code %d and %q", err, code, text)
		}
		return nil
	})
}
