package bench

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

	"github.com/warren-cni/warren/pkg/internal/apiserver"
	"github.com/warren-cni/warren/pkg/lab"
)

// writers is how many clients fill the API server at once.
const writers = 16

// apiStage is a stage whose daemons follow a real API server.
type apiStage struct {
	*stage
	config *rest.Config
	client kubernetes.Interface
}

// newAPIStage starts an API server that the nodes reach, and the daemons.
func newAPIStage(b *testing.B, name string, nodes int) *apiStage {
	b.Helper()
	server := apiserver.Start(b)
	config := server.Admin()
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		b.Fatal(err)
	}
	s := &apiStage{stage: newStage(b, name, nodes), config: config, client: client}
	s.namespace(namespace)
	for _, node := range s.Nodes {
		text, err := s.ReadText(node.Name)
		if err != nil {
			b.Fatal(err)
		}
		var object corev1.Node
		if err := yaml.Unmarshal(text, &object); err != nil {
			b.Fatal(err)
		}
		s.create(&object)
		s.relay(node)
	}
	kubeconfig := s.kubeconfig()
	s.start(func(*lab.Node) []string { return []string{"--objects", "", "--kubeconfig", kubeconfig} })
	return s
}

// kubeconfig writes the configuration of a client that may do everything.
func (s *apiStage) kubeconfig() string {
	s.b.Helper()
	const name = "bench"
	c := clientcmdapi.NewConfig()
	c.Clusters[name] = &clientcmdapi.Cluster{Server: s.config.Host, CertificateAuthorityData: s.config.CAData}
	c.AuthInfos[name] = &clientcmdapi.AuthInfo{ClientCertificateData: s.config.CertData, ClientKeyData: s.config.KeyData}
	c.Contexts[name] = &clientcmdapi.Context{Cluster: name, AuthInfo: name}
	c.CurrentContext = name
	path := filepath.Join(s.b.TempDir(), "kubeconfig")
	if err := clientcmd.WriteToFile(*c, path); err != nil {
		s.b.Fatal(err)
	}
	return path
}

// relay lets a node reach the API server, which listens on the loopback of another network namespace, at the same address.
func (s *apiStage) relay(node *lab.Node) {
	s.b.Helper()
	target, err := url.Parse(s.config.Host)
	if err != nil {
		s.b.Fatal(err)
	}
	var listener net.Listener
	err = node.Do(func() (err error) {
		listener, err = new(net.ListenConfig).Listen(s.b.Context(), "tcp", target.Host)
		return err
	})
	if err != nil {
		s.b.Fatal(err)
	}
	s.b.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			near, err := listener.Accept()
			if err != nil {
				return
			}
			go join(near, target.Host)
		}
	}()
}

// join connects and copies both ways until one side ends.
func join(near net.Conn, address string) {
	far, err := new(net.Dialer).DialContext(context.Background(), "tcp", address)
	if err != nil {
		_ = near.Close()
		return
	}
	for _, c := range [][2]net.Conn{{near, far}, {far, near}} {
		go func() {
			_, _ = io.Copy(c[0], c[1])
			_ = near.Close()
			_ = far.Close()
		}()
	}
}

// namespace makes a Namespace with the ServiceAccount that its pods need.
func (s *apiStage) namespace(name string) {
	s.b.Helper()
	s.create(&corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{"team": "team-" + name[len(name)-1:]}}})
	s.create(&corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Namespace: name, Name: "default"}})
}

// create creates an object of the kinds that do not matter for the time.
func (s *apiStage) create(object any) {
	s.b.Helper()
	var err error
	core, options := s.client.CoreV1(), metav1.CreateOptions{}
	switch o := object.(type) {
	case *corev1.Node:
		_, err = core.Nodes().Create(s.b.Context(), o, options)
	case *corev1.Namespace:
		_, err = core.Namespaces().Create(s.b.Context(), o, options)
	case *corev1.ServiceAccount:
		_, err = core.ServiceAccounts(o.Namespace).Create(s.b.Context(), o, options)
	default:
		err = fmt.Errorf("creating a %T", object)
	}
	if err != nil {
		s.b.Fatal(err)
	}
}

// createPod creates a pod, with its address where it has one already.
func (s *apiStage) createPod(pod *corev1.Pod, address netip.Addr) *corev1.Pod {
	s.b.Helper()
	pod.Spec.Containers = []corev1.Container{{Name: "main", Image: "none"}}
	pods := s.client.CoreV1().Pods(pod.Namespace)
	made, err := pods.Create(s.b.Context(), pod, metav1.CreateOptions{})
	if err == nil && address.IsValid() {
		made.Status.PodIP, made.Status.PodIPs = address.String(), []corev1.PodIP{{IP: address.String()}}
		made, err = pods.UpdateStatus(s.b.Context(), made, metav1.UpdateOptions{})
	}
	if err != nil {
		s.b.Error(err)
		return pod
	}
	return made
}

// pod makes a pod on a node; its label app is app.
func (s *apiStage) pod(i int, name, app string) *lab.Pod {
	s.b.Helper()
	labels := map[string]string{"app": app}
	made := s.createPod(&corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: labels}, Spec: corev1.PodSpec{NodeName: s.Nodes[i].Name},
	}, netip.Addr{})
	return s.add(i, lab.Pod{Name: name, Labels: labels, UID: made.UID})
}

// fill makes nodes with pods, and policies most of which concern only those: each lets an app of all namespaces of a team in to
// one of its namespace.
func (s *apiStage) fill(pods, policies int) {
	s.b.Helper()
	const namespaces, perNode, local = 100, 200, 20
	for i := range namespaces {
		s.namespace(fmt.Sprintf("ns-%02d", i))
	}
	for i := range (pods + perNode - 1) / perNode {
		cidr := fmt.Sprintf("10.244.%d.0/24", 100+i)
		s.create(&corev1.Node{
			ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("far-%d", i)}, Spec: corev1.NodeSpec{PodCIDR: cidr, PodCIDRs: []string{cidr}},
		})
	}
	s.parallel(pods, func(i int) {
		s.createPod(&corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{
				Namespace: fmt.Sprintf("ns-%02d", i%namespaces), Name: fmt.Sprintf("pod-%d", i),
				Labels: map[string]string{"app": fmt.Sprintf("app-%d", i/namespaces%10)},
			},
			Spec: corev1.PodSpec{NodeName: fmt.Sprintf("far-%d", i/perNode)},
		}, netip.AddrFrom4([4]byte{10, 244, byte(100 + i/perNode), byte(2 + i%perNode)}))
	})
	s.parallel(policies, func(i int) {
		p := ingress(fmt.Sprintf("policy-%d", i), fmt.Sprintf("app-%d", i%10), fmt.Sprintf("app-%d", (i+1)%10), 80)
		p.Namespace = fmt.Sprintf("ns-%02d", i%namespaces)
		if i < local {
			p.Namespace, p.Spec.PodSelector = namespace, *app("server")
		}
		p.Spec.Ingress[0].From[0].NamespaceSelector = &metav1.LabelSelector{MatchLabels: map[string]string{"team": fmt.Sprintf("team-%d", i%10)}}
		if _, err := s.client.NetworkingV1().NetworkPolicies(p.Namespace).Create(s.b.Context(), p, metav1.CreateOptions{}); err != nil {
			s.b.Error(err)
		}
	})
	if s.b.Failed() {
		s.b.FailNow()
	}
}

// parallel calls a function with each number below n.
func (s *apiStage) parallel(n int, do func(int)) {
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for i := w; i < n; i += writers {
				do(i)
			}
		})
	}
	all.Wait()
}
