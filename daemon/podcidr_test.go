package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/lab"
)

// A Node gets other podCIDRs: the leases that pods hold are honoured until they end, with their policies, through a restart of the daemon,
// too, and new pods get addresses of the new ones. Where a pod holds an address that is the node's own now, it keeps that, the node says
// so and gets through without; when the pod has ended, the node has it.
func TestPodCIDRChanges(t *testing.T) {
	t.Parallel()
	s := running(t, "wdcidr", 2)
	s.write("policy", isolateClosed())
	old, far := s.pod(0, "old"), s.pod(1, "far")
	for i := range 6 {
		if _, err := s.Nodes[0].AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: fmt.Sprintf("more-%d", i)}); err != nil {
			t.Fatal(err)
		}
	}
	c := changedCIDR{stage: s, old: old, far: far, closed: s.pod(0, "closed")}
	if want := "[10.244.1.9 fd00:10:244:1::9]"; fmt.Sprint(c.closed.Addresses) != want {
		t.Fatalf("the pod has %v, want %s", c.closed.Addresses, want)
	}
	c.reaches(old, far) // control: what is out of the new podCIDR reached other nodes
	c.hold()

	c.changePodCIDRs(0, "10.244.1.0/24", "10.244.1.8/29", "fd00:10:244:1::/64", "fd00:10:244:1::8/125")
	if p := s.problem(0, "NodeAddressHeld", "node-1"); !strings.Contains(p.Message, "shop/closed has ") {
		t.Errorf("problem %+v", p)
	}
	c.hold()
	fresh := s.pod(0, "fresh")
	for i, podCIDR := range []string{"10.244.1.8/29", "fd00:10:244:1::8/125"} {
		if a := fresh.Addresses[i]; !netip.MustParsePrefix(podCIDR).Contains(a) || a == c.closed.Addresses[i] {
			t.Errorf("a new pod has %v", fresh.Addresses)
		}
	}
	c.reaches(fresh, far)
	c.reaches(far, fresh)
	c.reaches(fresh, old)
	if err := s.daemons[0].Kill(); err != nil {
		t.Fatal(err)
	}
	s.startDaemon(0, nil)
	s.ready(0)
	s.problem(0, "NodeAddressHeld", "node-1")
	c.hold()

	for _, pod := range []*lab.Pod{c.closed, old} {
		if err := pod.Delete(t.Context()); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Lstat(filepath.Join(s.Nodes[0].Leases(), pod.Addresses[0].String())); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the lease of %s: %v", pod.Name, err)
		}
	}
	s.healthy(0)
	if own := c.own(); !strings.Contains(own, " 10.244.1.9/32 ") || !strings.Contains(own, " fd00:10:244:1::9/128 ") {
		t.Errorf("the node has %s", own)
	}
	c.nodeReaches(far)
}

// changedCIDR is a node whose podCIDRs change under its pods. The pod closed is isolated.
type changedCIDR struct {
	*stage
	old, closed, far *lab.Pod
}

// changePodCIDRs writes other text into a Node, the IPv4 podCIDR first, and waits until new pods get addresses by it.
func (s *stage) changePodCIDRs(i int, oldnew ...string) {
	s.t.Helper()
	node := s.Nodes[i]
	text, err := s.ReadText(node.Name)
	if err != nil {
		s.t.Fatal(err)
	}
	s.writeText(node.Name, strings.NewReplacer(oldnew...).Replace(string(text)))
	s.eventually(func() error {
		conflist, err := os.ReadFile(node.Conflist())
		if err == nil && !strings.Contains(string(conflist), oldnew[1]) {
			err = errors.New("the conflist still has the old podCIDR")
		}
		return err
	})
}

// hold demands that all is well with the pods that were there before.
func (c *changedCIDR) hold() {
	c.t.Helper()
	for _, pod := range []*lab.Pod{c.old, c.closed} {
		c.eventually(func() error { return pod.Check(c.t.Context()) })
	}
	c.reaches(c.closed, c.old)
	c.blocked(c.old, c.closed)
	c.nodeReaches(c.closed) // a pod's own node always does
	c.nodeReaches(c.far)
	if own := c.own(); strings.Contains(own, c.closed.Addresses[0].String()+"/") || strings.Contains(own, c.closed.Addresses[1].String()+"/") {
		c.t.Errorf("the node has a pod's address: %s", own)
	}
}

// nodeReaches demands that the node gets through to a pod.
func (c *changedCIDR) nodeReaches(pod *lab.Pod) {
	c.t.Helper()
	for _, a := range pod.Addresses {
		c.eventually(func() error {
			return tryFrom(c.t, c.Nodes[0].Netns(), netip.Addr{}, netip.AddrPortFrom(a, port), marker)
		})
	}
}

// own returns the addresses on the node's link to the mesh.
func (c *changedCIDR) own() string {
	c.t.Helper()
	out, err := c.Nodes[0].Run(c.t.Context(), "ip", "-o", "address", "show", "warren0")
	if err != nil {
		c.t.Fatal(err)
	}
	return out
}
