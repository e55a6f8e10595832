package main

import (
	"encoding/base64"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// The nodes of the proof. The villain's Node is the oldest, so that in no claim its age is against it.
const (
	near = iota
	villain
	far
)

// villainy is a stage whose second node is in the hands of somebody who has its keys and may write whatever its kubelet and its
// daemon may.
type villainy struct {
	*stage
	// nodes are the objects as their owners published them.
	nodes [3]corev1.Node
	pods  [3]*lab.Pod
	// before is what the honest nodes' devices and routes have to be, without what concerns the villain.
	before [3]string
	// attacks is how many there were.
	attacks int
}

// newVillainy makes nodes of different ages that know each other, with a pod on each.
func newVillainy(t *testing.T, name string) *villainy {
	t.Helper()
	v := &villainy{stage: newStage(t, name, 3)}
	for i, node := range v.Nodes {
		object := v.readNode(node.Name)
		object.UID = types.UID("uid-of-" + node.Name)
		object.CreationTimestamp = metav1.Date(2024, 1, 1+i, 0, 0, 0, 0, time.UTC)
		if i == villain {
			object.CreationTimestamp = metav1.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)
		}
		if i == far { // the way to one honest node is by the InternalIP, that to the other by the annotation
			object.Annotations = map[string]string{kube.AnnotationEndpoint: node.Addresses[0].String()}
		}
		v.write(node.Name, object)
		v.startTunnel(i)
	}
	for i := range v.Nodes {
		v.startDaemon(i, []string{"WARREN_SERVICE_CIDR=10.96.0.0/16"})
	}
	for i := range v.Nodes {
		v.ready(i)
	}
	for i, node := range v.Nodes {
		v.pods[i] = v.pod(i, fmt.Sprintf("pod-%d", i+1))
		v.nodes[i] = v.readNode(node.Name)
	}
	for i := range v.Nodes {
		v.healthy(i)
	}
	return v
}

// others describes the device and the routes of a node, without what is of the villain.
func (v *villainy) others(i int) string {
	v.t.Helper()
	var lines []string
	for _, p := range v.status(i).Peers {
		if p.Node == v.Nodes[villain].Name {
			v.keepsToItself(p)
			continue
		}
		lines = append(lines, fmt.Sprintf("peer %s %s %s %v", p.Node, p.PublicKey, p.Endpoint, p.AllowedIPs))
	}
	routes, err := v.Nodes[i].Run(v.t.Context(), "sh", "-ec", "ip route show table all; ip -6 route show table all; ip rule; ip -6 rule")
	if err != nil {
		v.t.Fatal(err)
	}
	for line := range strings.Lines(routes) {
		if !strings.HasPrefix(line, "10.244.2.") && !strings.HasPrefix(line, "fd00:10:244:2:") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// keepsToItself demands that the villain's peer has at most what was allocated to its Node.
func (v *villainy) keepsToItself(p agentapi.Peer) {
	v.t.Helper()
	for _, text := range p.AllowedIPs {
		allowed, err := netip.ParsePrefix(text)
		inside := func(own netip.Prefix) bool { return own.Bits() <= allowed.Bits() && own.Contains(allowed.Addr()) }
		if err != nil || !slices.ContainsFunc(v.Nodes[villain].PodCIDRs, inside) {
			v.t.Errorf("the villain's peer may send from %s", text)
		}
	}
}

// attack is a Node as the villain publishes it.
type attack struct {
	what string
	// edit changes the villain's honest Node.
	edit func(*corev1.Node)
	// victim is named beside the villain by a problem and an Event where another node is concerned.
	victim string
	// harmless is true where nothing is to be refused.
	harmless bool
}

// annotate returns an edit that sets annotations.
func annotate(pairs ...string) func(*corev1.Node) {
	return func(n *corev1.Node) {
		for i := 0; i < len(pairs); i += 2 {
			n.Annotations[pairs[i]] = pairs[i+1]
		}
	}
}

// from returns an edit that copies annotations of another Node.
func from(other corev1.Node, names ...string) func(*corev1.Node) {
	return func(n *corev1.Node) {
		for _, name := range names {
			n.Annotations[name] = other.Annotations[name]
		}
	}
}

// address returns an edit that sets the only InternalIP.
func address(a string) func(*corev1.Node) {
	return func(n *corev1.Node) {
		n.Status.Addresses = []corev1.NodeAddress{{Type: corev1.NodeInternalIP, Address: a}}
	}
}

// again returns an edit that makes the Node again with other podCIDRs, and a key that is proven for it.
func (v *villainy) again(podCIDRs ...string) func(*corev1.Node) {
	return func(n *corev1.Node) {
		n.UID = types.UID(fmt.Sprint("made-again-", v.attacks))
		n.CreationTimestamp = metav1.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
		n.Spec.PodCIDRs, n.Spec.PodCIDR = podCIDRs, podCIDRs[0]
		v.prove(n)
	}
}

// prove makes the proof of the villain's own key.
func (v *villainy) prove(n *corev1.Node) {
	v.t.Helper()
	text, err := os.ReadFile(filepath.Join(v.Nodes[villain].StateDir(), wgdevice.KeyFile))
	if err != nil {
		v.t.Fatal(err)
	}
	private, err := wgtypes.ParseKey(strings.TrimSpace(string(text)))
	if err != nil {
		v.t.Fatal(err)
	}
	proof, err := keyproof.Sign(private, n.Name, string(n.UID))
	if err != nil {
		v.t.Fatal(err)
	}
	n.Annotations[kube.AnnotationKeyProof] = base64.StdEncoding.EncodeToString(proof[:])
}

// list returns the attacks.
func (v *villainy) list() []attack {
	key, proof, port := kube.AnnotationPublicKey, kube.AnnotationKeyProof, kube.AnnotationPort
	garbage := strings.Repeat("garbage\u00ff\x1b[31m", 200<<10/13)
	ofNear, ofFar := v.nodes[near], v.nodes[far]
	both := func(edits ...func(*corev1.Node)) func(*corev1.Node) {
		return func(n *corev1.Node) {
			for _, edit := range edits {
				edit(n)
			}
		}
	}
	own6 := "fd00:10:244:2::/64"
	attacks := []attack{
		{what: "the key of a younger node", edit: from(ofFar, key), victim: "node-3"},
		{what: "the key of a younger node with its proof", edit: from(ofFar, key, proof), victim: "node-3"},
		{what: "the key of an older node with its proof", edit: both(v.again("10.244.2.0/24", own6), from(ofNear, key, proof)), victim: "node-1"},
		{what: "another node's key as the next one", edit: both(annotate(kube.AnnotationNextPublicKey, ofFar.Annotations[key]),
			annotate(kube.AnnotationNextKeyProof, ofFar.Annotations[proof])), victim: "node-3"},
		{what: "an address of the world as podCIDR", edit: v.again("8.8.8.8/32", own6)},
		{what: "everything as podCIDR", edit: v.again("0.0.0.0/0", "::/0")},
		{what: "the cluster CIDR as podCIDR", edit: v.again("10.244.0.0/16", "fd00:10:244::/48"), victim: "node-"},
		{what: "another node's podCIDR", edit: v.again("10.244.3.0/24", "fd00:10:244:3::/64"), victim: "node-3"},
		{what: "a part of another node's podCIDR", edit: v.again("10.244.1.128/25", own6), victim: "node-1"},
		{what: "its own podCIDR and more", edit: v.again("10.244.2.0/23", own6), victim: "node-3"},
		{what: "its own podCIDR again", edit: v.again("10.244.2.0/24", own6), harmless: true},
		{what: "a part of its own podCIDR", edit: v.again("10.244.2.0/25", own6), harmless: true},
		{what: "the nodes' network as podCIDR", edit: v.again("192.0.2.0/24", own6)},
		{what: "another node's InternalIP", edit: address("192.0.2.3"), victim: "node-3"},
		{what: "another node's InternalIP, at a port of another server", edit: both(address("192.0.2.3"), annotate(kube.AnnotationEndpoint, ":53")), victim: "node-3"},
		{what: "an InternalIP that is no address of a node", edit: address("127.0.0.1")},
		{what: "a pod's address as InternalIP", edit: address(v.pods[far].Addresses[0].String())},
		{what: "the API server's address as InternalIP", edit: address("192.0.2.254"), harmless: true},
		{what: "garbage as key", edit: annotate(key, garbage)},
		{what: "garbage everywhere", edit: annotate(key, garbage[:30<<10], proof, garbage[:30<<10], port, garbage[:30<<10], kube.AnnotationMTU, garbage[:30<<10],
			kube.AnnotationEndpoint, garbage[:30<<10], kube.AnnotationBehindNAT, garbage[:30<<10], kube.AnnotationNextPublicKey, garbage[:20<<10])},
		{what: "no port", edit: annotate(port, "0")},
	}
	for _, mtu := range []string{"-1", "0", "1", "99999999999"} {
		attacks = append(attacks, attack{what: "an MTU of " + mtu, edit: annotate(kube.AnnotationMTU, mtu)})
	}
	for endpoint, victim := range map[string]string{
		"127.0.0.1": "", "[::1]:51820": "", "224.0.0.1": "", "0.0.0.0:51820": "", "[ff02::1]:51820": "", "192.0.2.3:51820": "node-3", "192.0.2.1": "node-1", "[2001:db8::1]:51820": "node-1",
		"10.96.0.10:443": "", "169.254.169.254": "", v.pods[far].Addresses[0].String() + ":51820": "", "[fd00:10:244:3::5]:51820": "",
	} {
		attacks = append(attacks, attack{what: "the endpoint " + endpoint, edit: annotate(kube.AnnotationEndpoint, endpoint), victim: victim})
	}
	return attacks
}

// strike publishes what the villain says, waits until the honest nodes have taken it in, and looks what came of it.
func (v *villainy) strike(a attack) {
	v.t.Helper()
	v.attacks++
	node := *v.nodes[villain].DeepCopy()
	a.edit(&node)
	v.write(node.Name, node)
	v.taken()
	var codes []string
	for _, i := range []int{near, far} {
		if diff := cmp.Diff(v.before[i], v.others(i)); diff != "" {
			v.t.Errorf("%s changed %s (-before +after):\n%s", a.what, v.Nodes[i].Name, diff)
		}
		problems := v.status(i).Problems
		refused := slices.IndexFunc(problems, func(p agentapi.Problem) bool {
			text := p.Object + " " + p.Message
			return strings.HasPrefix(text, "Node ") && strings.Contains(text, node.Name) && strings.Contains(text, a.victim)
		})
		if (refused < 0) != a.harmless {
			v.t.Errorf("%s: harmless is %v, but %s has the problems %+v", a.what, a.harmless, v.Nodes[i].Name, problems)
		}
		if refused >= 0 {
			codes = append(codes, problems[refused].Code)
		}
	}
	if len(codes) > 0 {
		v.eventually(func() error { return v.told(codes, a.victim) })
	}
}

// taken waits until the honest nodes have taken in everything that was written: they have a problem with a Node that came later.
func (v *villainy) taken() {
	v.t.Helper()
	last := fmt.Sprint("z-", v.attacks) // behind those that report
	v.write("last", corev1.Node{TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Node"}, ObjectMeta: metav1.ObjectMeta{Name: last}})
	v.problem(near, "NodeWithoutPodCIDR", last)
	v.problem(far, "NodeWithoutPodCIDR", last)
}

// events returns the Events about Nodes that a node has written and that name the villain.
func (v *villainy) events(i int) (events []string) {
	for line := range strings.Lines(v.daemons[i].Log(1 << 20)) {
		if _, event, ok := strings.Cut(line, "msg=event "); ok && strings.Contains(event, "kind=Node") && strings.Contains(event, v.Nodes[villain].Name) {
			events = append(events, event)
		}
	}
	return events
}

// told is an error where no honest node has written an Event with one of the reasons and the names of villain and victim.
func (v *villainy) told(reasons []string, victim string) error {
	ofNear, ofFar := v.events(near), v.events(far)
	if !slices.ContainsFunc(slices.Concat(ofNear, ofFar), func(event string) bool {
		_, rest, _ := strings.Cut(event, "reason=")
		reason, _, _ := strings.Cut(rest, " ")
		return slices.Contains(reasons, reason) && strings.Contains(event, victim)
	}) {
		return fmt.Errorf("no Event %v names %q; there are %q and %q", reasons, victim, ofNear, ofFar)
	}
	return nil
}

// Whatever a stolen node says of itself, the honest nodes' peers and routes stay, and their connections; a problem and an Event
// name the conflict; and it cannot take a key that its owner has not published yet.
func TestProofHostileNode(t *testing.T) {
	t.Parallel()
	v := newVillainy(t, "wphnode")
	if err := v.daemons[villain].Stop(); err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{near, far} {
		v.before[i] = v.others(i)
	}
	connections := v.hold(v.pods[near], v.pods[far])
	for _, a := range v.list() {
		v.strike(a)
	}
	v.forgedPod()
	for _, err := range lost(connections) {
		t.Error(err)
	}
	summary(t, "%d attacks, %d connections held through them: %d lost", v.attacks, len(connections), len(lost(connections)))

	// The victim's Node is made again, and the villain publishes its key first.
	victim, key := v.Nodes[far].Name, v.nodes[far].Annotations[kube.AnnotationPublicKey]
	if err := v.daemons[far].Stop(); err != nil {
		t.Fatal(err)
	}
	fresh := *v.nodes[far].DeepCopy()
	fresh.UID, fresh.Annotations = "made-again", nil
	v.write(victim, fresh)
	stolen := *v.nodes[villain].DeepCopy()
	from(v.nodes[far], kube.AnnotationPublicKey, kube.AnnotationKeyProof)(&stolen)
	v.write(stolen.Name, stolen)
	v.eventually(func() error {
		if peers := v.status(near).Peers; len(peers) > 0 {
			return fmt.Errorf("the peers are %+v", peers)
		}
		return nil
	})
	v.eventually(func() error { // else the count above would prove nothing
		if n := len(lost(connections)); n < len(connections) {
			return fmt.Errorf("without a peer %d of %d connections are lost", n, len(connections))
		}
		return nil
	})
	v.startDaemon(far, nil)
	if err := v.Nodes[far].Ready(t.Context(), v.daemons[far], 1); err != nil {
		t.Fatal(err)
	}
	v.eventually(func() error {
		peers := v.status(near).Peers
		if len(peers) != 1 || peers[0].Node != victim || peers[0].PublicKey != key {
			return fmt.Errorf("the peers are %+v", peers)
		}
		return nil
	})
	v.reaches(v.pods[near], v.pods[far])
}

// forgedPod has the villain say that a pod of its own has the address of another node's pod, to be let in where that one is not.
func (v *villainy) forgedPod() {
	v.t.Helper()
	v.write("policy", rules{name: "friends", selector: app("guarded"), from: app("friend")}.object())
	guarded, err := v.Nodes[far].AddPod(v.t.Context(), lab.Pod{Namespace: "shop", Name: "guarded", Labels: app("guarded")})
	if err != nil {
		v.t.Fatal(err)
	}
	server, err := lab.NewEcho(v.t.Context(), guarded.Netns(), port)
	if err != nil {
		v.t.Fatal(err)
	}
	v.t.Cleanup(func() { _ = server.Close() })
	forged := corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "forged", UID: "forged", Labels: app("friend")},
		Spec:       corev1.PodSpec{NodeName: v.Nodes[villain].Name, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}
	for _, a := range v.pods[near].Addresses {
		forged.Status.PodIPs = append(forged.Status.PodIPs, corev1.PodIP{IP: a.String()})
	}
	v.attacks++
	v.write("forged", forged)
	v.taken()
	v.blocked(v.pods[near], guarded)
	v.reaches(v.pod(near, "friend"), guarded) // who has the label itself gets in
}
