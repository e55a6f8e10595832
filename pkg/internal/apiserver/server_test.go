package apiserver

import (
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
)

func TestServer(t *testing.T) {
	server := Start(t)
	admin := clientset(t, server.Admin())

	t.Run("a watch sees a namespace that is made", func(t *testing.T) {
		seen, err := admin.CoreV1().Namespaces().Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=burrow"})
		if err != nil {
			t.Fatal(err)
		}
		defer seen.Stop()
		makeNamespace(t, admin, "burrow")
		if event := <-seen.ResultChan(); event.Type != watch.Added {
			t.Errorf("watching the namespace: got %s, want %s", event.Type, watch.Added)
		}
	})

	t.Run("a kubelet changes its own node only", func(t *testing.T) {
		for _, name := range []string{"n1", "n2"} {
			node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name}}
			if _, err := admin.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		kubelet := clientset(t, server.Kubelet("n1"))
		patch := []byte(`{"metadata":{"annotations":{"example.com/a":"b"}}}`)
		for name, allowed := range map[string]bool{"n1": true, "n2": false} {
			_, err := kubelet.CoreV1().Nodes().Patch(t.Context(), name, "application/merge-patch+json", patch, metav1.PatchOptions{})
			if allowed && err != nil || !allowed && !apierrors.IsForbidden(err) {
				t.Errorf("patching node %s as the kubelet of n1: got %v, want allowed = %v", name, err, allowed)
			}
		}
	})

	t.Run("a token that is bound to a pod names the pod's node", func(t *testing.T) {
		makeNamespace(t, admin, "tokens")
		client := clientset(t, server.Bearer(podToken(t, admin, "tokens", "n3")))
		review, err := client.AuthenticationV1().SelfSubjectReviews().
			Create(t.Context(), &authenticationv1.SelfSubjectReview{}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		got := review.Status.UserInfo
		if want := "system:serviceaccount:tokens:agent"; got.Username != want {
			t.Errorf("user of the token: got %q, want %q", got.Username, want)
		}
		if node := got.Extra["authentication.kubernetes.io/node-name"]; len(node) != 1 || node[0] != "n3" {
			t.Errorf("node of the token: got %q, want n3", node)
		}
	})
}

// podToken returns a token of a ServiceAccount that is bound to a pod on a node.
func podToken(t *testing.T, admin kubernetes.Interface, namespace, node string) string {
	t.Helper()
	if _, err := admin.CoreV1().Nodes().Create(t.Context(),
		&corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: node}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	accounts := admin.CoreV1().ServiceAccounts(namespace)
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "agent"}}
	if _, err := accounts.Create(t.Context(), account, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	pod, err := admin.CoreV1().Pods(namespace).Create(t.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "agent"},
		Spec: corev1.PodSpec{
			ServiceAccountName: "agent",
			NodeName:           node,
			Containers:         []corev1.Container{{Name: "agent", Image: "agent"}},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	request, err := accounts.CreateToken(t.Context(), "agent", &authenticationv1.TokenRequest{
		Spec: authenticationv1.TokenRequestSpec{
			BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
		},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return request.Status.Token
}

func makeNamespace(t *testing.T, admin kubernetes.Interface, name string) {
	t.Helper()
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := admin.CoreV1().Namespaces().Create(t.Context(), namespace, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

func clientset(t *testing.T, config *rest.Config) *kubernetes.Clientset {
	t.Helper()
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return client
}
