package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
)

// programs are those under test.
var programs lab.Programs

func TestMain(m *testing.M) { os.Exit(programs.Main(m.Run)) }

// The time that a change may take until it is seen, longer than that between two looks of a busy node at itself, and that a probe waits when it must
// not get through.
var (
	changePatience = soak.Patience(45 * time.Second)
	closedPatience = 700 * time.Millisecond
)

// port is where the servers of the pods listen.
const port = 8080

// stage is a lab with the real daemon on its nodes.
type stage struct {
	*lab.Lab
	t       *testing.T
	tunnels []*lab.Process
	daemons []*lab.Process
}

// newStage makes nodes on which nothing runs yet.
func newStage(t *testing.T, name string, nodes int) *stage {
	t.Helper()
	return newStageOf(t, lab.Options{Name: name, Nodes: nodes})
}

// newStageOf completes the options and makes nodes on which nothing runs yet.
func newStageOf(t *testing.T, o lab.Options) *stage {
	t.Helper()
	binaries, err := programs.Dir(context.WithoutCancel(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	o.Warrend, o.Plugins = filepath.Join(binaries, "warrend"), []string{binaries}
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	if o.WireGuard == "" {
		o.WireGuard = lab.TestedWireGuard()
	}
	network, err := lab.New(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	s := &stage{Lab: network, t: t, tunnels: make([]*lab.Process, o.Nodes), daemons: make([]*lab.Process, o.Nodes)}
	t.Cleanup(func() {
		if t.Failed() {
			for i, daemon := range s.daemons {
				if daemon != nil {
					t.Logf("the log of %s ends in:\n%s", s.Nodes[i].Name, daemon.Log(40))
				}
			}
		}
		if err := network.Close(t.Context()); err != nil {
			t.Error(err)
		}
	})
	s.write("namespace-shop", corev1.Namespace{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: "shop"},
	})
	return s
}

// running makes nodes with tunnels and daemons that are ready.
func running(t *testing.T, name string, nodes int) *stage {
	t.Helper()
	return runningOf(t, lab.Options{Name: name, Nodes: nodes})
}

// runningOf makes nodes by options, with tunnels and daemons that are ready.
func runningOf(t *testing.T, o lab.Options) *stage {
	t.Helper()
	s := newStageOf(t, o)
	for i := range s.Nodes {
		s.startTunnel(i)
	}
	s.startDaemons()
	return s
}

// startTunnel starts a node's tunnel process.
func (s *stage) startTunnel(i int) {
	s.t.Helper()
	var err error
	if s.tunnels[i], err = s.Nodes[i].StartTunnel(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

// startDaemon starts a node's daemon and does not wait for it.
func (s *stage) startDaemon(i int, env []string) {
	s.t.Helper()
	var err error
	s.daemons[i], err = s.Nodes[i].StartDaemon(s.t.Context(), env, "--log-level", "debug")
	if err != nil {
		s.t.Fatal(err)
	}
}

// startDaemons starts all daemons and waits until each is ready and knows all others.
func (s *stage) startDaemons() {
	s.t.Helper()
	for i := range s.Nodes {
		s.startDaemon(i, nil)
	}
	for i := range s.Nodes {
		s.ready(i)
	}
}

// startWithRestore starts the first node with a script in the place of each iptables-restore, and waits until it is ready.
func (s *stage) startWithRestore(script, file string) {
	s.t.Helper()
	s.startTunnel(0)
	s.startDaemon(0, s.restoreBy(script, file))
	s.ready(0)
}

// restoreBy is the environment in which a script stands in the place of each iptables-restore. In the script %[1]s is the actual
// program, and %[2]s a file by which the test tells it what to do.
func (s *stage) restoreBy(script, file string) []string {
	s.t.Helper()
	tools := s.t.TempDir()
	for _, name := range []string{"iptables-restore", "ip6tables-restore", "iptables-nft-restore", "ip6tables-nft-restore"} {
		actual, err := exec.LookPath(name)
		if err != nil {
			s.t.Fatal(err)
		}
		if err = os.WriteFile(filepath.Join(tools, name), fmt.Appendf(nil, script, actual, file), 0o755); err != nil {
			s.t.Fatal(err)
		}
	}
	return []string{"PATH=" + tools + ":" + os.Getenv("PATH")}
}

// ready waits until a node's daemon is ready and knows all others.
func (s *stage) ready(i int) {
	s.t.Helper()
	if err := s.Nodes[i].Ready(s.t.Context(), s.daemons[i], len(s.Nodes)-1); err != nil {
		s.t.Fatal(err)
	}
}

// write writes objects.
func (s *stage) write(name string, objects ...any) {
	s.t.Helper()
	if err := s.Write(name, objects...); err != nil {
		s.t.Fatal(err)
	}
}

// writeText writes a file that need not be a good one.
func (s *stage) writeText(name, text string) {
	s.t.Helper()
	if err := s.WriteText(name, []byte(text)); err != nil {
		s.t.Fatal(err)
	}
}

// pod makes a pod with a server on a node; its label app is its name.
func (s *stage) pod(i int, name string) *lab.Pod {
	s.t.Helper()
	pod, err := s.Nodes[i].AddPod(s.t.Context(), lab.Pod{Namespace: "shop", Name: name, Labels: map[string]string{"app": name}})
	if err != nil {
		s.t.Fatal(err)
	}
	server, err := lab.NewEcho(s.t.Context(), pod.Netns(), port)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = server.Close() })
	return pod
}

// isolateClosed is a policy that lets nobody in to the pods with the label app=closed.
func isolateClosed() networkingv1.NetworkPolicy {
	return networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "isolate-closed"},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: metav1.LabelSelector{MatchLabels: map[string]string{"app": "closed"}},
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
		},
	}
}

// marker is the message of all probes that are not captured.
var marker = lab.NewMarker()

// reaches demands that a pod gets through to another, over both families. That there is no way does not count at once: the kernel says so
// for the moment in which a tunnel's peer is made anew, because handshakes crossed.
func (s *stage) reaches(from, to *lab.Pod) {
	s.t.Helper()
	for _, address := range to.Addresses {
		ctx, cancel := context.WithTimeout(s.t.Context(), changePatience)
		var err error
		for {
			err = lab.Probe(ctx, from.Netns(), netip.AddrPortFrom(address, port), marker)
			if !errors.Is(err, unix.EHOSTUNREACH) || ctx.Err() != nil {
				break
			}
		}
		cancel()
		if err != nil {
			s.t.Errorf("%s does not reach %s (%v): %v", from.Name, to.Name, address, err)
		}
	}
}

// blocked demands that a pod does not get through to another, over neither family.
func (s *stage) blocked(from, to *lab.Pod) {
	s.t.Helper()
	var group sync.WaitGroup
	for _, address := range to.Addresses {
		group.Go(func() {
			ctx, cancel := context.WithTimeout(s.t.Context(), closedPatience)
			defer cancel()
			if lab.Probe(ctx, from.Netns(), netip.AddrPortFrom(address, port), marker) == nil {
				s.t.Errorf("%s reaches %s (%v)", from.Name, to.Name, address)
			}
		})
	}
	group.Wait()
}

// status asks a node's daemon.
func (s *stage) status(i int) agentapi.Status {
	s.t.Helper()
	status, err := s.Nodes[i].Status(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	return status
}

// problem waits until a node's status has a problem with that code of that object, and returns it.
func (s *stage) problem(i int, code, object string) agentapi.Problem {
	s.t.Helper()
	var found agentapi.Problem
	s.eventually(func() error {
		status, err := s.Nodes[i].Status(s.t.Context())
		if err != nil {
			return err
		}
		at := slices.IndexFunc(status.Problems, func(p agentapi.Problem) bool { return p.Code == code && strings.Contains(p.Object, object) })
		if at < 0 {
			return fmt.Errorf("no problem %s of %s, but %+v", code, object, status.Problems)
		}
		found = status.Problems[at]
		return nil
	})
	if found.Message == "" || found.Remedy == "" {
		s.t.Errorf("a problem without message or remedy: %+v", found)
	}
	return found
}

// healthy waits until a node is ready and has no problem.
func (s *stage) healthy(i int) {
	s.t.Helper()
	s.eventually(func() error {
		status, err := s.Nodes[i].Status(s.t.Context())
		if err != nil {
			return err
		}
		if !status.Ready || len(status.Problems) > 0 {
			return fmt.Errorf("ready %v, problems %+v", status.Ready, status.Problems)
		}
		return nil
	})
}

// eventually waits for a condition.
func (s *stage) eventually(condition func() error) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), changePatience)
	defer cancel()
	if err := lab.Until(ctx, condition); err != nil {
		s.t.Fatal(err)
	}
}
