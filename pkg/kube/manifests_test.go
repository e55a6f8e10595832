package kube_test

import (
	"context"
	"log/slog"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/warren-cni/warren/pkg/internal/apiserver"
	"github.com/warren-cni/warren/pkg/kube"
)

const (
	namespace = "warren-system"
	account   = "warren"

	ownKey       = `{"metadata":{"annotations":{"warren.cni/wireguard-public-key":"k"}}}`
	takePodCIDRs = `{"spec":{"podCIDR":"10.244.9.0/24","podCIDRs":["10.244.9.0/24"]}}`
)

// fixture is an API server with Warren applied, and the Nodes n1 and n2.
type fixture struct {
	server *apiserver.Server
	admin  kubernetes.Interface
	config string // kubeconfig of the administrator
}

func newFixture(t *testing.T) fixture {
	t.Helper()
	server := apiserver.Start(t)
	f := fixture{server: server, admin: client(t, server.Admin()), config: writeKubeconfig(t, server.Admin())}
	for _, name := range []string{"n1", "n2"} {
		f.createNode(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{
			Name: name, Labels: map[string]string{"zone": "a"}, Annotations: map[string]string{"example.com/owner": "somebody"},
		}})
	}
	return f
}

func client(t *testing.T, config *rest.Config) kubernetes.Interface {
	t.Helper()
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// writeKubeconfig makes the file that kubectl wants.
func writeKubeconfig(t *testing.T, config *rest.Config) string {
	t.Helper()
	file := clientcmdapi.NewConfig()
	file.Clusters["test"] = &clientcmdapi.Cluster{Server: config.Host, CertificateAuthorityData: config.CAData}
	file.AuthInfos["test"] = &clientcmdapi.AuthInfo{ClientCertificateData: config.CertData, ClientKeyData: config.KeyData}
	file.Contexts["test"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: "test"}
	file.CurrentContext = "test"
	path := filepath.Join(t.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*file, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func (f fixture) createNode(t *testing.T, node *corev1.Node) {
	t.Helper()
	if _, err := f.admin.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// apply applies files of manifests as a user does, and checks that nothing in them is unknown to the server.
func (f fixture) apply(t *testing.T, args ...string) {
	t.Helper()
	kubectl, err := filepath.Abs("../../build/tools/kubectl")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), kubectl, append([]string{"--kubeconfig", f.config, "apply", "--validate=strict"}, args...)...)
	cmd.Dir = "../../manifests"
	out, err := cmd.CombinedOutput()
	if err != nil || strings.Contains(string(out), "Warning") {
		t.Fatalf("applying manifests (scripts/tools/build.sh kubectl builds the program): %v\n%v\n%s", cmd.Args, err, out)
	}
}

// token returns a token of Warren's ServiceAccount: bound to a new pod on the node, or to nothing for an empty name.
func (f fixture) token(t *testing.T, node string) string {
	t.Helper()
	request := &authenticationv1.TokenRequest{}
	if node != "" {
		pod, err := f.admin.CoreV1().Pods(namespace).Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: "warren-" + node},
			Spec:       corev1.PodSpec{ServiceAccountName: account, NodeName: node, Containers: []corev1.Container{{Name: "warrend", Image: "warren"}}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID}
	}
	answer, err := f.admin.CoreV1().ServiceAccounts(namespace).CreateToken(t.Context(), account, request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return answer.Status.Token
}

func patchNode(ctx context.Context, c kubernetes.Interface, node, patch string) error {
	_, err := c.CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, []byte(patch), metav1.PatchOptions{})
	return err
}

// awaitDenial waits until an admission policy that was just applied is in force.
func awaitDenial(t *testing.T, c kubernetes.Interface, node, patch, message string) {
	t.Helper()
	var last error
	err := wait.PollUntilContextTimeout(t.Context(), 100*time.Millisecond, time.Minute, true, func(ctx context.Context) (bool, error) {
		_, last = c.CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, []byte(patch), metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		return last != nil && strings.Contains(last.Error(), message), nil
	})
	if err != nil {
		t.Fatalf("waiting for the admission policy that says %q: the last answer was %v", message, last)
	}
}

// TestManifests applies all manifests and examples to a real API server, and checks that the RBAC and the admission policies
// in them allow what the daemon does and nothing else.
func TestManifests(t *testing.T) {
	f := newFixture(t)
	kubelet := client(t, f.server.Kubelet("n1"))

	// The positive control: without Warren's admission policy a kubelet may take any pod CIDR.
	f.createNode(t, &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n0"}})
	if err := patchNode(t.Context(), client(t, f.server.Kubelet("n0")), "n0", takePodCIDRs); err != nil {
		t.Fatalf("a kubelet takes a pod CIDR before Warren is applied: %v, want it to be possible", err)
	}

	f.apply(t, "-f", "warren.yaml")
	f.apply(t, "-f", "userspace-tunnel.yaml")
	f.apply(t, "-f", "examples/tiers.yaml", "-f", "examples/tiers-pods.yaml")
	f.apply(t, "--namespace", "web", "-f", "examples/deny-all.yaml", "-f", "examples/deny-all-empty-lists.yaml",
		"-f", "examples/allow-dns.yaml", "-f", "examples/allow-apiserver.yaml")
	f.apply(t, "--dry-run=server", "-f", "warren.yaml", "-f", "userspace-tunnel.yaml")

	_, err := f.admin.CoreV1().Events("default").Create(t.Context(), &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: "of-n2"}, InvolvedObject: corev1.ObjectReference{Kind: "Node", Name: "n1"},
		Source: corev1.EventSource{Component: "warren", Host: "n2"}, Reason: "Tested", Type: corev1.EventTypeWarning,
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	daemon := f.server.Bearer(f.token(t, "n1"))
	awaitDenial(t, kubelet, "n1", takePodCIDRs, "must not set spec.podCIDRs")
	awaitDenial(t, client(t, daemon), "n2", ownKey, "may only change the Node that its pod runs on")

	t.Run("kubelet", func(t *testing.T) { testKubelet(t, f) })
	t.Run("daemon", func(t *testing.T) { testDaemon(t, f, daemon) })
	t.Run("source", func(t *testing.T) { testSource(t, daemon, f.admin) })
	t.Run("hostile node", func(t *testing.T) { testHostile(t, f) })
	t.Run("protection", func(t *testing.T) { testProtection(t, daemon, f) })
	t.Run("pod security", func(t *testing.T) { testPodSecurity(t, f) })
}

// testSource checks that the ClusterRole is enough for everything that the daemon does with the API.
func testSource(t *testing.T, daemon *rest.Config, admin kubernetes.Interface) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	source, err := kube.NewAPI(daemon, "n1", slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	if err = source.Refresh(ctx, namespace, "warren-n1", "another"); err == nil || apierrors.IsForbidden(err) {
		t.Errorf("fetching a pod with a wrong uid: got %v, want that it has another", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- source.Run(ctx) }()
	if err = source.WaitForSync(ctx); err != nil {
		t.Error(err)
	}
	snapshot, problems := source.Snapshot()
	if len(snapshot.Nodes) == 0 || len(snapshot.Namespaces) == 0 || len(snapshot.Pods) == 0 || len(snapshot.Policies) == 0 || len(problems) > 0 {
		t.Errorf("the snapshot is %+v with problems %v, want objects of every kind", snapshot, problems)
	}
	if err = source.Publish(ctx, map[string]string{kube.AnnotationPort: "51820"}); err != nil {
		t.Error(err)
	}
	testQuestionsAndEvents(ctx, t, source, admin)
	cancel()
	if err = <-ended; err != nil {
		t.Error(err)
	}
}

// testQuestionsAndEvents reads a Service and writes an Event.
func testQuestionsAndEvents(ctx context.Context, t *testing.T, source *kube.API, admin kubernetes.Interface) {
	t.Helper()
	service, err := source.Service(ctx, "default", "kubernetes")
	if err != nil || len(service.ClusterIPs) == 0 {
		t.Fatalf("the Service of the API server is %+v (%v), want its address", service, err)
	}
	if _, found, err := source.ServiceAt(ctx, service.ClusterIPs[0]); err != nil || !found {
		t.Errorf("the Service at %v: found = %v, %v", service.ClusterIPs[0], found, err)
	}
	watch, err := admin.CoreV1().Events(namespace).Watch(ctx, metav1.ListOptions{FieldSelector: "reason=Tested"})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	event := kube.Event{Object: kube.Reference{Kind: "Pod", Namespace: namespace, Name: "warren-n1"}, Type: kube.Normal, Reason: "Tested", Message: "m"}
	// The second one patches the first.
	for count := int32(1); count <= 2; count++ {
		source.Event(ctx, event)
		select {
		case change := <-watch.ResultChan():
			if written, ok := change.Object.(*corev1.Event); !ok || written.Count != count {
				t.Errorf("the event is %+v, want it with count %d", change.Object, count)
			}
		case <-ctx.Done():
			t.Fatalf("event %d did not reach the server", count)
		}
	}
}

// testPodSecurity checks that the namespace's label is needed, and enough.
func testPodSecurity(t *testing.T, f fixture) {
	const strict = "strict"
	_, err := f.admin.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{
		Name: strict, Labels: map[string]string{"pod-security.kubernetes.io/enforce": "baseline"},
	}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// A controller makes the account "default" in a cluster; "warren" is that of the daemon.
	for _, a := range [][2]string{{namespace, "default"}, {strict, "default"}, {strict, account}} {
		object := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: a[1]}}
		if _, err = f.admin.CoreV1().ServiceAccounts(a[0]).Create(t.Context(), object, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"warren", "warren-tunnel"} {
		set, err := f.admin.AppsV1().DaemonSets(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		create := func(namespace string) error {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name + "-probe"}, Spec: set.Spec.Template.Spec}
			_, err := f.admin.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
			return err
		}
		if err = create(namespace); err != nil {
			t.Errorf("a pod of %s in its namespace: %v", name, err)
		}
		expectForbidden(t, "a pod of "+name+" under the baseline standard", create(strict), "violates PodSecurity")
	}
}
