// Package bench measures all of Warren together: the real daemon and plugin on nodes of a lab, packets between their pods, and a
// real API server. What a package does by itself, its own benchmarks measure. `make bench` runs both and holds them against
// targets.
package bench

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/warren-cni/warren/pkg/lab"
)

// namespace is that of the pods that are on the nodes of a lab.
const namespace = "shop"

// patience is more than anything here takes that does not fail.
const patience = 30 * time.Second

// programs are those under test.
var programs lab.Programs

func TestMain(m *testing.M) { os.Exit(programs.Main(m.Run)) }

// stage is a lab for one benchmark.
type stage struct {
	*lab.Lab
	b *testing.B
	// plugins is the directory of the plugin.
	plugins string
	// tunnels and daemons are the nodes', in their order.
	tunnels, daemons []*lab.Process
}

// newStage makes nodes with tunnels, on which no daemon runs yet.
func newStage(b *testing.B, name string, nodes int) *stage {
	b.Helper()
	return newStageOf(b, lab.Options{Name: name, Nodes: nodes})
}

// newStageOf completes the options and makes nodes with tunnels, on which no daemon runs yet.
func newStageOf(b *testing.B, o lab.Options) *stage {
	b.Helper()
	binaries, err := programs.Dir(context.WithoutCancel(b.Context()))
	if err != nil {
		b.Fatal(err)
	}
	o.Dir, o.Warrend, o.Plugins = b.TempDir(), filepath.Join(binaries, "warrend"), []string{binaries}
	network, err := lab.New(b.Context(), o)
	if err != nil {
		b.Fatal(err)
	}
	s := &stage{Lab: network, b: b, plugins: binaries}
	b.Cleanup(func() {
		for i, daemon := range s.daemons {
			if b.Failed() {
				b.Logf("the log of %s ends in:\n%s", s.Nodes[i].Name, daemon.Log(40))
			}
		}
		if err := network.Close(context.Background()); err != nil {
			b.Error(err)
		}
	})
	s.write("namespace", corev1.Namespace{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: namespace},
	})
	for _, node := range s.Nodes {
		tunnel, err := node.StartTunnel(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		s.tunnels = append(s.tunnels, tunnel)
	}
	return s
}

// start starts the daemons, with further flags for each, and waits until they are ready.
func (s *stage) start(flags func(*lab.Node) []string) {
	s.b.Helper()
	for _, node := range s.Nodes {
		daemon, err := node.StartDaemon(s.b.Context(), nil, flags(node)...)
		if err != nil {
			s.b.Fatal(err)
		}
		s.daemons = append(s.daemons, daemon)
	}
	for i, node := range s.Nodes {
		if err := node.Ready(s.b.Context(), s.daemons[i], len(s.Nodes)-1); err != nil {
			s.b.Fatal(err)
		}
	}
}

// noFlags are the flags of a daemon that reads the lab's directory of objects.
func noFlags(*lab.Node) []string { return nil }

// write writes objects for daemons that read the directory.
func (s *stage) write(name string, objects ...any) {
	s.b.Helper()
	if err := s.Write(name, objects...); err != nil {
		s.b.Fatal(err)
	}
}

// pod makes a pod on a node; its label app is app.
func (s *stage) pod(i int, name, app string) *lab.Pod {
	s.b.Helper()
	return s.add(i, lab.Pod{Name: name, Labels: map[string]string{"app": app}})
}

// add makes a pod on a node.
func (s *stage) add(i int, pod lab.Pod) *lab.Pod {
	s.b.Helper()
	pod.Namespace = namespace
	made, err := s.Nodes[i].AddPod(s.b.Context(), pod)
	if err != nil {
		s.b.Fatal(err)
	}
	return made
}

// eventually waits for a condition.
func (s *stage) eventually(condition func() error) {
	s.b.Helper()
	ctx, cancel := context.WithTimeout(s.b.Context(), patience)
	defer cancel()
	if err := lab.Until(ctx, condition); err != nil {
		s.b.Fatal(err)
	}
}

// probe waits until a pod gets through to another's TCP port, or until it does not.
func (s *stage) probe(from, to *lab.Pod, port uint16, through bool) {
	s.b.Helper()
	s.eventually(func() error {
		ctx, cancel := context.WithTimeout(s.b.Context(), time.Second)
		defer cancel()
		err := lab.Probe(ctx, from.Netns(), netip.AddrPortFrom(to.Addresses[0], port), lab.NewMarker())
		switch {
		case through:
			return err
		case err == nil:
			return fmt.Errorf("%s gets through to %s", from.Name, to.Name)
		default:
			return nil
		}
	})
}

// echo starts a TCP server in a pod.
func (s *stage) echo(pod *lab.Pod, port uint16) {
	s.b.Helper()
	server, err := lab.NewEcho(s.b.Context(), pod.Netns(), port)
	if err != nil {
		s.b.Fatal(err)
	}
	s.b.Cleanup(func() { _ = server.Close() })
}

// within runs a function in a pod's network namespace, and ends the benchmark where it fails.
func (s *stage) within(pod *lab.Pod, do func() error) {
	s.b.Helper()
	if err := pod.Netns().Do(func(ns.NetNS) error { return do() }); err != nil {
		s.b.Fatal(err)
	}
}

// ingress is a policy that lets one app in to another, at one port where it is not 0.
func ingress(name, to, from string, port int32) *networkingv1.NetworkPolicy {
	rule := networkingv1.NetworkPolicyIngressRule{From: []networkingv1.NetworkPolicyPeer{{PodSelector: app(from)}}}
	if port != 0 {
		rule.Ports = []networkingv1.NetworkPolicyPort{{Port: new(intstr.FromInt32(port))}}
	}
	return &networkingv1.NetworkPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: "networking.k8s.io/v1", Kind: "NetworkPolicy"},
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: networkingv1.NetworkPolicySpec{
			PodSelector: *app(to),
			PolicyTypes: []networkingv1.PolicyType{networkingv1.PolicyTypeIngress},
			Ingress:     []networkingv1.NetworkPolicyIngressRule{rule},
		},
	}
}

// app selects the pods with a label.
func app(value string) *metav1.LabelSelector {
	return &metav1.LabelSelector{MatchLabels: map[string]string{"app": value}}
}

// milliseconds converts to the unit of the report.
func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// percentile returns the value that a share of the values does not exceed.
func percentile[T time.Duration | float64](values []T, share float64) T {
	sorted := slices.Sorted(slices.Values(values))
	return sorted[min(len(sorted)-1, int(share*float64(len(sorted))))]
}
