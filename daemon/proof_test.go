package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// summary prints what a proof came to.
func summary(t *testing.T, format string, values ...any) {
	t.Helper()
	t.Logf("proof: "+format, values...)
}

// The tags of who sends in the proofs: those that may not arrive and those that must.
const (
	tagForbidden uint32 = 1 + iota
	tagAllowed
	tagNear
	tagFar
	// tagPod is the first of those of single pods.
	tagPod uint32 = 1000
)

// counter counts what arrives in a network namespace; the test fails if packets got lost to it.
func (s *stage) counter(netns ns.NetNS) *tagged.Counter {
	s.t.Helper()
	counter, err := tagged.Count(netns)
	if err != nil {
		s.t.Fatal(err)
	}
	var once sync.Once
	s.t.Cleanup(func() {
		once.Do(func() {
			if err := counter.Stop(); err != nil {
				s.t.Error(err)
			}
		})
	})
	return counter
}

// fire lets a pod send until the gun is told to cease.
func (s *stage) fire(pod *lab.Pod, f tagged.Fire) *tagged.Gun {
	s.t.Helper()
	g, err := tagged.Start(s.t.Context(), pod.Netns(), f)
	if err != nil {
		s.t.Fatal(err)
	}
	return g
}

// arrives waits until so many more packets than now are counted of which the condition holds.
func (s *stage) arrives(counter *tagged.Counter, more int, condition func(tagged.Arrival) bool) {
	s.t.Helper()
	before := counter.Packets(condition)
	s.eventually(func() error {
		if now := counter.Packets(condition); now < before+more {
			return fmt.Errorf("%d packets arrived, %d are expected", now-before, more)
		}
		return nil
	})
}

// pause lets the packets fly for a while.
func (s *stage) pause(d time.Duration) {
	s.t.Helper()
	select {
	case <-time.After(d):
	case <-s.t.Context().Done():
	}
}

// replaceWarrend puts a new file in the place of the daemon's binary, as an upgrade does.
func replaceWarrend(t *testing.T) {
	t.Helper()
	binaries, err := programs.Dir(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(binaries, "warrend")
	old, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = old.Close() }()
	draft, err := os.CreateTemp(binaries, "warrend-")
	if err == nil {
		_, err = io.Copy(draft, old)
	}
	if err == nil {
		err = draft.Chmod(0o755)
	}
	if err == nil {
		err = draft.Close()
	}
	if err == nil {
		err = os.Rename(draft.Name(), path)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// rules is a policy of the namespace shop.
type rules struct {
	name     string
	selector map[string]string
	// from are the labels of those who may come in; nil lets in nobody.
	from map[string]string
	// both isolates for egress, too, and lets out to nobody.
	both bool
}

// object is the policy's object.
func (r rules) object() networkingv1.NetworkPolicy {
	policy := networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: r.name},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: r.selector},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
		},
	}
	if r.both {
		policy.Spec.PolicyTypes = append(policy.Spec.PolicyTypes, networkingv1.PolicyTypeEgress)
	}
	if r.from != nil {
		policy.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{
			From: []networkingv1.NetworkPolicyPeer{{PodSelector: &metav1.LabelSelector{MatchLabels: r.from}}},
		}}
	}
	return policy
}

// app is the label that tells pods apart.
func app(name string) map[string]string { return map[string]string{"app": name} }

// family4 and family6 tell arrivals apart.
func family4(a tagged.Arrival) bool { return a.Dst.Is4() }
func family6(a tagged.Arrival) bool { return a.Dst.Is6() }

// inFamilies holds that both families and all protocols of a tag have arrived.
func inFamilies(counter *tagged.Counter, tag uint32) error {
	for name, family := range map[string]func(tagged.Arrival) bool{"IPv4": family4, "IPv6": family6} {
		for _, protocol := range tagged.Protocols() {
			if counter.Packets(func(a tagged.Arrival) bool { return a.Tag == tag && family(a) && a.Protocol == protocol }) == 0 {
				return fmt.Errorf("no %s over %s arrives with tag %d", protocol, name, tag)
			}
		}
	}
	return nil
}

// addresses are those of pods.
func addresses(pods ...*lab.Pod) []netip.Addr {
	var all []netip.Addr
	for _, pod := range pods {
		all = slices.Concat(all, pod.Addresses)
	}
	return all
}

// startDaemonOn starts a node's daemon on another directory of objects, or on an API server.
func (s *stage) startDaemonOn(i int, objects, kubeconfig string) {
	s.t.Helper()
	var err error
	s.daemons[i], err = s.Nodes[i].StartDaemon(s.t.Context(), nil, "--log-level", "debug",
		"--objects", objects, "--kubeconfig", kubeconfig)
	if err != nil {
		s.t.Fatal(err)
	}
}

// errNothing says that what must arrive has not arrived yet.
var errNothing = errors.New("nothing arrives")

// closes waits until a pod gets through to another over neither family.
func (s *stage) closes(from, to *lab.Pod) {
	s.t.Helper()
	s.eventually(func() error {
		for _, address := range to.Addresses {
			ctx, cancel := context.WithTimeout(s.t.Context(), closedPatience)
			err := lab.Probe(ctx, from.Netns(), netip.AddrPortFrom(address, port), marker)
			cancel()
			if err == nil {
				return fmt.Errorf("%s reaches %s (%v)", from.Name, to.Name, address)
			}
		}
		return nil
	})
}
