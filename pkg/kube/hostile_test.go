package kube_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/mesh"
)

// hostile is an API server with the Nodes h1, h2 and h3, of which h2 is stolen, as h1 reads it.
type hostile struct {
	fixture
	t      *testing.T
	ctx    context.Context
	source *kube.API
	// kubelet and daemon are the credentials of h2's.
	kubelet, daemon kubernetes.Interface
	published       [3]map[string]string
	// before is the peer h3 as it has to stay.
	before mesh.Peer
}

// testHostile does all that the server lets the kubelet and the daemon of a stolen node do to others, and checks that it does nothing.
func testHostile(t *testing.T, f fixture) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	h := &hostile{fixture: f, t: t, ctx: ctx}
	for i := range h.published {
		h.join(i)
	}
	h.kubelet, h.daemon = client(t, f.server.Kubelet("h2")), client(t, f.server.Bearer(f.token(t, "h2")))
	source, err := kube.NewAPI(f.server.Bearer(f.token(t, "h1")), "h1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	h.source = source
	ended := make(chan error, 1)
	go func() { ended <- source.Run(ctx) }()
	if err = source.WaitForSync(ctx); err != nil {
		t.Fatal(err)
	}
	var ok bool
	if h.before, ok = h.peer("h3"); !ok {
		t.Fatal("h3 is no peer")
	}
	h.annotations()
	h.statuses()
	h.pods()
	cancel()
	if err = <-ended; err != nil {
		t.Error(err)
	}
}

// join makes a Node with a podCIDR and an address, and publishes a proven key.
func (h *hostile) join(i int) {
	h.t.Helper()
	name := fmt.Sprintf("h%d", i+1)
	node, err := h.admin.CoreV1().Nodes().Create(h.ctx, &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: corev1.NodeSpec{PodCIDRs: []string{fmt.Sprintf("10.244.10%d.0/24", i+1)}},
	}, metav1.CreateOptions{})
	if err != nil {
		h.t.Fatal(err)
	}
	private, err := wgtypes.GeneratePrivateKey()
	if err != nil {
		h.t.Fatal(err)
	}
	proof, err := keyproof.Sign(private, name, string(node.UID))
	if err != nil {
		h.t.Fatal(err)
	}
	h.published[i] = map[string]string{
		kube.AnnotationPublicKey: private.PublicKey().String(), kube.AnnotationPort: "51820", kube.AnnotationKeyProof: base64.StdEncoding.EncodeToString(proof[:]),
	}
	h.annotate(h.admin, name, h.published[i])
	if err := h.address(h.admin, name, fmt.Sprintf("192.0.2.%d", i+1)); err != nil {
		h.t.Fatal(err)
	}
}

// annotate patches a Node's annotations.
func (h *hostile) annotate(c kubernetes.Interface, node string, annotations map[string]string) {
	h.t.Helper()
	patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": annotations}})
	if err != nil {
		h.t.Fatal(err)
	}
	if err = patchNode(h.ctx, c, node, string(patch)); err != nil {
		h.t.Fatal(err)
	}
}

// address patches a Node's InternalIP.
func (h *hostile) address(c kubernetes.Interface, node, address string) error {
	patch := fmt.Sprintf(`{"status":{"addresses":[{"type":"InternalIP","address":%q}]}}`, address)
	_, err := c.CoreV1().Nodes().Patch(h.ctx, node, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, "status")
	return err
}

// plan is the mesh of h1.
func (h *hostile) plan() (mesh.Config, []cluster.Problem, cluster.Snapshot) {
	snapshot, _ := h.source.Snapshot()
	config, problems := mesh.Plan(snapshot, mesh.Options{
		ClusterCIDRs: []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16")}, ListenPort: 51820, Encrypted: true,
	})
	return config, problems, snapshot
}

// peer returns a peer of h1.
func (h *hostile) peer(name string) (mesh.Peer, bool) {
	config, _, _ := h.plan()
	i := slices.IndexFunc(config.Peers, func(p mesh.Peer) bool { return p.Node == name })
	if i < 0 {
		return mesh.Peer{}, false
	}
	return config.Peers[i], true
}

// harmless waits until h1 has seen something, and demands that h3 is the peer that it was.
func (h *hostile) harmless(what string, seen func(cluster.Snapshot, []cluster.Problem) bool) {
	h.t.Helper()
	for {
		_, problems, snapshot := h.plan()
		if seen(snapshot, problems) {
			break
		}
		select {
		case <-h.source.Changed():
		case <-h.ctx.Done():
			h.t.Fatalf("%s was not seen; problems %v", what, problems)
		}
	}
	now, _ := h.peer("h3")
	if diff := cmp.Diff(h.before, now, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b })); diff != "" {
		h.t.Errorf("%s changed the peer h3 (-before +after):\n%s", what, diff)
	}
}

// refused is seen once h2 is refused, with the name of h3.
func refused(_ cluster.Snapshot, problems []cluster.Problem) bool {
	return slices.ContainsFunc(problems, func(p cluster.Problem) bool { return p.Object == "Node h2" && p.Owner == "h3" })
}

// annotations has the daemon of h2 publish what is h3's.
func (h *hostile) annotations() {
	h.t.Helper()
	for what, annotations := range map[string]map[string]string{
		"the key and the proof of another node": h.published[2],
		"another node's endpoint":               {kube.AnnotationEndpoint: "192.0.2.3:51820"},
	} {
		h.annotate(h.daemon, "h2", annotations)
		h.harmless(what, refused)
		restored := map[string]any{kube.AnnotationEndpoint: nil}
		for name, value := range h.published[1] {
			restored[name] = value
		}
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": restored}})
		if err != nil {
			h.t.Fatal(err)
		}
		if err = patchNode(h.ctx, h.daemon, "h2", string(patch)); err != nil {
			h.t.Fatal(err)
		}
		h.harmless("taking it back", func(s cluster.Snapshot, problems []cluster.Problem) bool { return !refused(s, problems) })
	}
}

// statuses has the kubelet of h2 say that h3's address is its own.
func (h *hostile) statuses() {
	h.t.Helper()
	expectForbidden(h.t, "changing another Node's address", h.address(h.kubelet, "h3", "192.0.2.2"), "is not allowed to modify node")
	if err := h.address(h.kubelet, "h2", "192.0.2.3"); err != nil {
		h.t.Fatal(err)
	}
	h.harmless("another node's address", func(s cluster.Snapshot, _ []cluster.Problem) bool {
		node, _ := s.Node("h2")
		return slices.Contains(node.Addresses, netip.MustParseAddr("192.0.2.3"))
	})
}

// pods has the kubelet of h2 say that a pod of its own has an address of another node.
func (h *hostile) pods() {
	h.t.Helper()
	patch := func(pod, address string) error {
		text := fmt.Sprintf(`{"status":{"podIP":%q,"podIPs":[{"ip":%[1]q}]}}`, address)
		_, err := h.kubelet.CoreV1().Pods(namespace).Patch(h.ctx, pod, types.MergePatchType, []byte(text), metav1.PatchOptions{}, "status")
		return err
	}
	expectForbidden(h.t, "changing the address of another node's pod", patch("warren-h1", "10.244.102.7"), "")
	for address, want := range map[string]int{"10.244.103.7": 0, "192.0.2.3": 0, "10.244.102.7": 1} {
		if err := patch("warren-h2", address); err != nil {
			h.t.Fatal(err)
		}
		var enters int
		h.harmless("a pod with the address "+address, func(s cluster.Snapshot, _ []cluster.Problem) bool {
			said := slices.ContainsFunc(s.Pods, func(p cluster.Pod) bool {
				return p.Name == "warren-h2" && slices.Contains(p.Addresses, netip.MustParseAddr(address))
			})
			state := cluster.NewState("h1")
			state.Update(s.Delta(), cluster.Attachments{All: true})
			for _, p := range state.Snapshot().Pods {
				if p.Name == "warren-h2" {
					enters = len(p.Addresses)
				}
			}
			return said
		})
		if enters != want {
			h.t.Errorf("a pod of h2 with %s has %d addresses that sets may hold, want %d", address, enters, want)
		}
	}
}
