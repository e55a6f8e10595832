package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/warren-cni/warren/pkg/lab"
)

// A Node gets other podCIDRs: the leases that pods hold are honoured until they end, with their policies, through a restart of the daemon,
// too, and new pods get addresses of the new ones. Where a pod holds an address that is the node's own now, it keeps that, the node says
// so, and nothing of the node's own goes to other nodes' pods as if that pod sent it; when the pod has ended, the node has it.
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
	c.nodeReaches(far)
	c.hold()

	c.changePodCIDRs(0, "10.244.1.8/29", "fd00:10:244:1::8/125")
	if p := s.problem(0, "NodeAddressHeld", "node-1"); !strings.Contains(p.Message, "shop/closed has ") {
		t.Errorf("problem %+v", p)
	}
	c.hold()
	c.nodeIsCutOff(far)
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
	c.nodeIsCutOff(far)

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

// A node with IPv4 alone gets a podCIDR of IPv6, too: the pod that runs keeps what it has, and the next one has both families.
func TestPodCIDRAdded(t *testing.T) {
	t.Parallel()
	s := newStage(t, "wdadded", 2)
	const podCIDR6 = "  - fd00:10:244:1::/64\n"
	both, err := s.ReadText("node-1")
	if err != nil || !strings.Contains(string(both), podCIDR6) {
		t.Fatalf("the Node is (%v)\n%s", err, both)
	}
	s.writeText("node-1", strings.Replace(string(both), podCIDR6, "", 1))
	for i := range s.Nodes {
		s.startTunnel(i)
	}
	s.startDaemons()
	s.write("policy", isolateClosed())
	old, closed, far := s.pod(0, "old"), s.pod(0, "closed"), s.pod(1, "far")
	if len(old.Addresses) != 1 {
		t.Fatalf("the pod has %v", old.Addresses)
	}
	hold := func() {
		t.Helper()
		for _, pod := range []*lab.Pod{old, closed} {
			s.eventually(func() error { return pod.Check(t.Context()) })
		}
		s.reaches(far, old)
		s.reaches(closed, old)
		s.blocked(far, closed)
	}
	hold()

	s.changePodCIDRs(0, "10.244.1.0/24", "fd00:10:244:1::/64")
	hold()
	fresh := s.pod(0, "fresh")
	if len(fresh.Addresses) != 2 || fresh.Addresses[0] == old.Addresses[0] || !netip.MustParsePrefix("fd00:10:244:1::/64").Contains(fresh.Addresses[1]) {
		t.Fatalf("a new pod has %v", fresh.Addresses)
	}
	s.reaches(fresh, far)
	s.reaches(far, fresh)
	s.reaches(fresh, old)
	s.blocked(fresh, closed)
	hold()
	s.healthy(0)
	s.healthy(1)
}

// changedCIDR is a node whose podCIDRs change under its pods. The pod closed is isolated.
type changedCIDR struct {
	*stage
	old, closed, far *lab.Pod
}

// changePodCIDRs gives a Node other podCIDRs and waits until new pods get addresses by them.
func (s *stage) changePodCIDRs(i int, podCIDRs ...string) {
	s.t.Helper()
	name := s.Nodes[i].Name
	text, err := s.ReadText(name)
	if err != nil {
		s.t.Fatal(err)
	}
	var node corev1.Node
	if err = yaml.Unmarshal(text, &node); err != nil {
		s.t.Fatal(err)
	}
	node.Spec.PodCIDR, node.Spec.PodCIDRs = podCIDRs[0], podCIDRs
	s.write(name, node)
	s.eventually(func() error {
		conflist, err := os.ReadFile(s.Nodes[i].Conflist())
		for _, podCIDR := range podCIDRs {
			if err == nil && !strings.Contains(string(conflist), podCIDR) {
				err = fmt.Errorf("the conflist does not have the podCIDR %s", podCIDR)
			}
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

// nodeIsCutOff demands that the node does not get through to a pod, for whom its address would be another pod's.
func (c *changedCIDR) nodeIsCutOff(pod *lab.Pod) {
	c.t.Helper()
	for _, a := range pod.Addresses {
		if err := tryFrom(c.t, c.Nodes[0].Netns(), netip.Addr{}, netip.AddrPortFrom(a, port), marker); err == nil {
			c.t.Errorf("the node reaches %s, though its address there is a pod's", a)
		}
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
