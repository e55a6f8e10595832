package proof

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
)

// How many objects there are at most of each kind.
const (
	localPods   = 6
	remotePods  = 40
	policyNames = 25
)

// storm changes a cluster at random.
type storm struct {
	*cluster
	r      *rand.Rand
	locals map[string]*local
	remote map[string]*corev1.Pod
	policy map[string]bool
	serial int
	kinds  map[string]int
}

// local is a pod of the node.
type local struct {
	object *corev1.Pod
	pod    *lab.Pod
}

// namespaceNames and labelSets are small, so that things meet.
func namespaceNames() []string { return []string{"a", "b", "c"} }

func labelSets() []map[string]string {
	return []map[string]string{{}, {"app": "x"}, {"app": "y"}, {"app": "x", "role": "m"}, {"app": "y", "role": "n"}, {"role": "m"}}
}

// pick returns one of a list.
func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

// anyKey returns one of the keys of a map, which must not be empty.
func anyKey[V any](r *rand.Rand, m map[string]V) string {
	return pick(r, slices.Sorted(maps.Keys(m)))
}

// event makes one random change.
func (s *storm) event() {
	s.t.Helper()
	kind, change := s.choose()
	s.kinds[kind]++
	change()
}

// choose says what happens next.
func (s *storm) choose() (kind string, change func()) {
	n := s.r.IntN(1000)
	switch {
	case n < 10:
		return "watches cut", s.proxy.cut
	case n < 15:
		return "watches frozen", s.proxy.freeze
	case n < 30:
		return "watches flow", s.proxy.flow
	case n < 35:
		return "relist", func() {
			s.proxy.fail(http.StatusGone, isWatch)
			s.proxy.cut()
		}
	case n < 40:
		return "server away", func() {
			s.proxy.fail(http.StatusServiceUnavailable, isAny)
			s.proxy.cut()
		}
	case n < 60:
		return "server back", s.proxy.recover
	case n < 70:
		return "local pod replaced", s.replaceLocal
	case n < 200:
		return "local pod relabelled", func() {
			one := s.locals[anyKey(s.r, s.locals)]
			one.object = s.relabel(one.object, pick(s.r, labelSets()))
		}
	case n < 250:
		return "namespace relabelled", s.relabelNamespace
	case n < 450 || len(s.remote) == 0:
		return "remote pod", s.addRemote
	case n < 600:
		return "remote pod relabelled", func() {
			name := anyKey(s.r, s.remote)
			s.remote[name] = s.relabel(s.remote[name], pick(s.r, labelSets()))
		}
	case n < 650:
		return "remote pod ended", func() {
			name := anyKey(s.r, s.remote)
			addresses := []string{}
			for _, ip := range s.remote[name].Status.PodIPs {
				addresses = append(addresses, ip.IP)
			}
			fresh, err := s.client.CoreV1().Pods(s.remote[name].Namespace).Get(s.t.Context(), name, metav1.GetOptions{})
			if err != nil {
				s.t.Fatal(err)
			}
			s.setStatus(fresh, pick(s.r, []corev1.PodPhase{corev1.PodSucceeded, corev1.PodFailed, corev1.PodRunning}), addresses...)
		}
	case n < 700:
		return "remote pod deleted", func() {
			name := anyKey(s.r, s.remote)
			s.deletePod(s.remote[name])
			delete(s.remote, name)
		}
	case n < 760 && len(s.policy) > 0:
		return "policy deleted", func() { s.deletePolicy(anyKey(s.r, s.policy)) }
	default:
		return "policy", s.writePolicy
	}
}

// addRemote makes a pod of another node.
func (s *storm) addRemote() {
	if len(s.remote) >= remotePods {
		name := anyKey(s.r, s.remote)
		s.deletePod(s.remote[name])
		delete(s.remote, name)
	}
	s.serial++
	name, node, host := fmt.Sprintf("far-%d", s.serial), 2+s.r.IntN(2), 2+s.serial%250
	pod := s.createPod(pick(s.r, namespaceNames()), name, fmt.Sprintf("node-%d", node), pick(s.r, labelSets()))
	s.setStatus(pod, corev1.PodRunning, fmt.Sprintf("10.244.%d.%d", node, host), fmt.Sprintf("fd00:10:244:%d::%x", node, host))
	s.remote[name] = pod
}

// addLocal makes a pod of the node, which must be reachable for that.
func (s *storm) addLocal() {
	s.t.Helper()
	s.serial++
	name := fmt.Sprintf("near-%d", s.serial)
	object := s.createPod(pick(s.r, namespaceNames()), name, "node-1", pick(s.r, labelSets()))
	pod, err := s.node.AddPod(s.t.Context(), lab.Pod{Namespace: object.Namespace, Name: name, UID: object.UID})
	if err != nil {
		s.t.Fatal(err)
	}
	s.setStatus(object, corev1.PodRunning, pod.Addresses[0].String(), pod.Addresses[1].String())
	s.locals[name] = &local{object: object, pod: pod}
}

// replaceLocal deletes a pod of the node and makes another one.
func (s *storm) replaceLocal() {
	name := anyKey(s.r, s.locals)
	one := s.locals[name]
	delete(s.locals, name)
	s.proxy.recover() // a pod starts only where its object can be read
	if err := one.pod.Delete(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	s.deletePod(one.object)
	s.addLocal()
}

func (s *storm) relabelNamespace() {
	name := pick(s.r, namespaceNames())
	namespace, err := s.client.CoreV1().Namespaces().Get(s.t.Context(), name, metav1.GetOptions{})
	if err == nil {
		namespace.Labels = map[string]string{"team": pick(s.r, []string{"red", "blue"}), "kubernetes.io/metadata.name": name}
		_, err = s.client.CoreV1().Namespaces().Update(s.t.Context(), namespace, metav1.UpdateOptions{})
	}
	if err != nil {
		s.t.Fatal(err)
	}
}

// writePolicy creates a policy, or replaces the one that has its name.
func (s *storm) writePolicy() {
	key := fmt.Sprintf("%s/p%d", pick(s.r, namespaceNames()), s.r.IntN(policyNames))
	if s.policy[key] {
		s.deletePolicy(key)
	}
	namespace, name, _ := strings.Cut(key, "/")
	policy := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: randomSpec(s.r)}
	if _, err := s.client.NetworkingV1().NetworkPolicies(namespace).Create(s.t.Context(), policy, metav1.CreateOptions{}); err != nil {
		s.t.Fatal(err)
	}
	s.policy[key] = true
}

func (s *storm) deletePolicy(key string) {
	namespace, name, _ := strings.Cut(key, "/")
	if err := s.client.NetworkingV1().NetworkPolicies(namespace).Delete(s.t.Context(), name, metav1.DeleteOptions{}); err != nil {
		s.t.Fatal(err)
	}
	delete(s.policy, key)
}

// randomSpec is what a policy may say.
func randomSpec(r *rand.Rand) networkingv1.NetworkPolicySpec {
	spec := networkingv1.NetworkPolicySpec{
		PodSelector: metav1.LabelSelector{MatchLabels: pick(r, labelSets())},
		PolicyTypes: pick(r, [][]networkingv1.PolicyType{{"Ingress"}, {"Egress"}, {"Ingress", "Egress"}}),
	}
	for range r.IntN(3) {
		spec.Ingress = append(spec.Ingress, networkingv1.NetworkPolicyIngressRule{From: randomPeers(r), Ports: randomPorts(r)})
		spec.Egress = append(spec.Egress, networkingv1.NetworkPolicyEgressRule{To: randomPeers(r), Ports: randomPorts(r)})
	}
	return spec
}

// randomPeers are up to two.
func randomPeers(r *rand.Rand) []networkingv1.NetworkPolicyPeer {
	selector := func() *metav1.LabelSelector { return &metav1.LabelSelector{MatchLabels: pick(r, labelSets())} }
	team := &metav1.LabelSelector{MatchLabels: map[string]string{"team": "red"}}
	var peers []networkingv1.NetworkPolicyPeer
	for range r.IntN(3) {
		peers = append(peers, pick(r, []networkingv1.NetworkPolicyPeer{
			{PodSelector: selector()},
			{NamespaceSelector: team},
			{PodSelector: selector(), NamespaceSelector: team},
			{IPBlock: &networkingv1.IPBlock{CIDR: "10.244.0.0/16", Except: []string{"10.244.2.0/25"}}},
			{IPBlock: &networkingv1.IPBlock{CIDR: "fd00:10:244::/48"}},
			{IPBlock: &networkingv1.IPBlock{CIDR: "0.0.0.0/0"}},
		}))
	}
	return peers
}

// randomPorts are up to two.
func randomPorts(r *rand.Rand) []networkingv1.NetworkPolicyPort {
	tcp, udp := corev1.ProtocolTCP, corev1.ProtocolUDP
	var ports []networkingv1.NetworkPolicyPort
	for range r.IntN(3) {
		ports = append(ports, pick(r, []networkingv1.NetworkPolicyPort{
			{Protocol: &tcp, Port: new(intstr.FromInt32(80))},
			{Protocol: &udp, Port: new(intstr.FromInt32(1000)), EndPort: new(int32(2000))},
			{Protocol: &tcp, Port: new(intstr.FromString("http"))},
			{Protocol: &udp},
		}))
	}
	return ports
}

// kernelState is what of a node's rules and sets is Warren's, each chain's rules in their order, all else sorted.
func kernelState(t *testing.T, node *lab.Node) string {
	t.Helper()
	var saved string
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := lab.Until(ctx, func() (err error) { // a set that goes while the rules are read is an error of the program that reads them
		saved, err = node.Run(ctx, "sh", "-ec", "echo ipv4; iptables-save; echo ipv6; ip6tables-save; ipset save")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	chains := map[string][]string{}
	var family, table string
	for line := range strings.Lines(saved) {
		line = strings.TrimSpace(line)
		words := strings.Fields(line)
		switch {
		case line == "ipv4" || line == "ipv6":
			family = line
		case strings.HasPrefix(line, "*"):
			table = line[1:]
		case !strings.Contains(line, "WARREN"):
		case strings.HasPrefix(line, ":"):
			key := family + " " + table + " " + words[0][1:]
			chains[key] = append(chains[key], "chain")
		case words[0] == "-A":
			key := family + " " + table + " " + words[1]
			chains[key] = append(chains[key], line)
		case words[0] == "create":
			chains["set "+words[1]] = append(chains["set "+words[1]], strings.Join(words[:5], " "))
		case words[0] == "add":
			chains["set "+words[1]] = append(chains["set "+words[1]], line)
		}
	}
	var text strings.Builder
	for _, key := range slices.Sorted(maps.Keys(chains)) {
		if strings.HasPrefix(key, "set ") {
			slices.Sort(chains[key])
		}
		fmt.Fprintf(&text, "%s\n\t%s\n", key, strings.Join(chains[key], "\n\t"))
	}
	return text.String()
}

// orphans are the chains and sets of a state to which nothing leads.
func orphans(state string) (found []string) {
	for line := range strings.Lines(state) {
		if strings.HasPrefix(line, "\t") {
			continue
		}
		words := strings.Fields(line)
		name := words[len(words)-1]
		if !strings.HasPrefix(name, "WARREN") {
			continue // a hook
		}
		led := strings.Contains(state, "-j "+name+"\n") || strings.Contains(state, "-g "+name+"\n") || strings.Contains(state, "--match-set "+name+" ")
		if !led {
			found = append(found, strings.TrimSpace(line))
		}
	}
	return found
}

// After any number of random changes, while watches are cut, frozen, told to begin anew and refused, the kernel holds exactly what
// a daemon makes that reads the same objects for the first time, and nothing that nobody uses.
func TestProofEventsConverge(t *testing.T) {
	t.Parallel()
	s := &storm{
		cluster: newCluster(t, "wpevents"), r: soak.Random(t), kinds: map[string]int{},
		locals: map[string]*local{}, remote: map[string]*corev1.Pod{}, policy: map[string]bool{},
	}
	for _, name := range namespaceNames() {
		s.createNamespace(name)
	}
	for range localPods {
		s.addLocal()
	}
	empty := kernelState(t, s.node)
	events := soak.Trials(10000)
	for range events {
		s.event()
	}
	s.proxy.recover()
	s.proxy.flow()

	fresh := s.freshNode()
	s.eventually(func() error { return same(t, fresh, s.node) })
	state := kernelState(t, s.node)
	if found := orphans(state); len(found) > 0 {
		t.Errorf("nothing leads to %q", found)
	}
	if state == empty || strings.Count(state, "WARREN-I-")+strings.Count(state, "WARREN-E-") < 4 {
		t.Errorf("there is nothing to compare:\n%s", state)
	}

	// While its watches are frozen the first daemon does not see what the second does: the comparison sees it.
	s.proxy.freeze()
	for key := range maps.Clone(s.policy) {
		s.deletePolicy(key)
	}
	s.eventually(func() error {
		if same(t, fresh, s.node) == nil {
			return errors.New("the states do not differ")
		}
		return nil
	})
	s.proxy.flow()
	s.eventually(func() error { return same(t, fresh, s.node) })
	if found := orphans(kernelState(t, s.node)); len(found) > 0 {
		t.Errorf("without policies nothing leads to %q", found)
	}
	t.Logf("proof: %d events (%v): the kernel holds what a fresh daemon makes, 0 orphans", events, s.kinds)
}

// same is an error unless the kernels of two nodes hold the same.
func same(t *testing.T, want, got *lab.Node) error {
	t.Helper()
	if diff := cmp.Diff(kernelState(t, want), kernelState(t, got)); diff != "" {
		return fmt.Errorf("the kernel holds something else than a fresh daemon's (-fresh +got):\n%s", diff)
	}
	return nil
}

// freshNode is another namespace with a daemon that is the same node, with the same pods and the same key.
func (s *storm) freshNode() *lab.Node {
	s.t.Helper()
	node := s.newLab("wpfresh", 1).Nodes[0]
	err := errors.Join(
		os.CopyFS(node.Leases(), os.DirFS(s.node.Leases())),
		os.CopyFS(node.StateDir(), os.DirFS(s.node.StateDir())),
		// The key is nobody's but the daemon's.
		os.Chmod(node.StateDir(), 0o700), os.Chmod(node.StateDir()+"/wireguard.key", 0o600),
	)
	if err != nil {
		s.t.Fatal(err)
	}
	s.start(node, 0)
	return node
}
