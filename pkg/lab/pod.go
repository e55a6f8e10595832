package lab

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"

	"github.com/containernetworking/cni/libcni"
	cnitypes "github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/uuid"
)

// Pod is a pod on a node of the lab: a network namespace that the real plugin has wired.
type Pod struct {
	Node      *Node
	Namespace string
	Name      string
	Labels    map[string]string
	// Listen is called in AddPod with the pod's network namespace, before any plugin: what listens then sees the first packet
	// that ever reaches the pod. It may be nil.
	Listen func(netns ns.NetNS) error
	// Capabilities are what the runtime hands to plugins that ask for it (portMappings, bandwidth).
	Capabilities map[string]any
	// UID is set by AddPod where it is empty: that of an object in an API server is the server's choice.
	UID types.UID
	// Addresses are the leased ones, IPv4 first; set by AddPod.
	Addresses []netip.Addr

	namespace string
	netns     ns.NetNS
}

// AddPod does what a kubelet does for a new pod: the Pod object exists with its uid, the runtime calls the plugins of the
// conflist, and the addresses come into the object's status. Where it fails nothing is left behind but what the
// plugin itself left; so the error of a plugin is its CNI error.
func (n *Node) AddPod(ctx context.Context, pod Pod) (*Pod, error) {
	p, err := n.NewPod(ctx, pod)
	if err != nil {
		return nil, err
	}
	if err = p.Wire(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("adding pod %s/%s on %s: %w", pod.Namespace, pod.Name, n.Name, err), p.drop(ctx))
	}
	return p, n.lab.Write(p.file(), p.object())
}

// NewPod makes the object and the network namespace of a pod, which nothing has wired yet.
func (n *Node) NewPod(ctx context.Context, pod Pod) (*Pod, error) {
	pod.Node = n
	if pod.UID == "" {
		pod.UID = uuid.NewUUID()
	}
	pod.namespace = fmt.Sprintf("%s-%s-%s", n.namespace, pod.Namespace, pod.Name)
	err := n.lab.Write(pod.file(), pod.object())
	if err == nil {
		pod.netns, err = addNamespace(ctx, pod.namespace)
	}
	if err == nil {
		err = batch(ctx, pod.namespace, "link set lo up")
	}
	if err == nil && pod.Listen != nil {
		err = pod.Listen(pod.netns)
	}
	if err != nil {
		return nil, errors.Join(err, pod.drop(ctx))
	}
	return &pod, nil
}

// Wire runs the plugins' ADD, which is killed when ctx ends.
func (p *Pod) Wire(ctx context.Context) error {
	list, config, err := p.Node.cni()
	if err != nil {
		return err
	}
	return p.Node.Do(func() error {
		raw, err := config.AddNetworkList(ctx, list, p.runtime())
		if err != nil {
			return err
		}
		result, err := current.NewResultFromResult(raw)
		if err != nil {
			return err
		}
		p.Addresses = nil
		for _, ip := range result.IPs {
			address, _ := netip.AddrFromSlice(ip.Address.IP)
			p.Addresses = append(p.Addresses, address.Unmap())
		}
		return nil
	})
}

// Unwire runs the plugins' DEL, which is killed when ctx ends.
func (p *Pod) Unwire(ctx context.Context) error {
	list, config, err := p.Node.cni()
	if err != nil {
		return err
	}
	return p.Node.Do(func() error { return config.DelNetworkList(ctx, list, p.runtime()) })
}

// Check runs the plugins' CHECK.
func (p *Pod) Check(ctx context.Context) error {
	list, config, err := p.Node.cni()
	if err != nil {
		return err
	}
	return p.Node.Do(func() error { return config.CheckNetworkList(ctx, list, p.runtime()) })
}

// Readiness runs the plugins' STATUS.
func (n *Node) Readiness(ctx context.Context) error {
	list, config, err := n.cni()
	if err != nil {
		return err
	}
	return n.Do(func() error { return config.GetStatusNetworkList(ctx, list) })
}

// Collect runs the plugins' GC for a runtime that has lost its state: it names no attachment as valid, and deletes none itself.
func (n *Node) Collect(ctx context.Context) error {
	list, _, err := n.cni()
	if err != nil {
		return err
	}
	cache, err := os.MkdirTemp(n.dir, "cni-cache-")
	if err != nil {
		return err
	}
	config := libcni.NewCNIConfigWithCacheDir(n.lab.options.Plugins, cache, nil)
	err = n.Do(func() error {
		return config.GCNetworkList(ctx, list, &libcni.GCArgs{ValidAttachments: []cnitypes.GCAttachment{}})
	})
	return errors.Join(err, os.RemoveAll(cache))
}

// Delete does what a kubelet does for a deleted pod.
func (p *Pod) Delete(ctx context.Context) error {
	if err := p.Unwire(ctx); err != nil {
		return fmt.Errorf("deleting pod %s/%s on %s: %w", p.Namespace, p.Name, p.Node.Name, err)
	}
	return p.drop(ctx)
}

// drop removes the network namespace and the object.
func (p *Pod) drop(ctx context.Context) error {
	errs := []error{p.Node.lab.Remove(p.file())}
	return errors.Join(append(errs, p.lose(ctx))...)
}

// Abandon does what a runtime does that crashed and lost its state: the network namespace goes, and no DEL comes.
func (p *Pod) Abandon(ctx context.Context) error { return p.lose(ctx) }

// lose removes the network namespace.
func (p *Pod) lose(ctx context.Context) error {
	var err error
	if p.netns != nil {
		err = p.netns.Close()
		p.netns = nil
	}
	return errors.Join(err, deleteNamespace(ctx, p.namespace))
}

// cni returns the node's conflist and what runs it.
func (n *Node) cni() (*libcni.NetworkConfigList, *libcni.CNIConfig, error) {
	list, err := libcni.NetworkConfFromFile(n.Conflist())
	if err != nil {
		return nil, nil, fmt.Errorf("reading the conflist of %s: %w", n.Name, err)
	}
	return list, libcni.NewCNIConfigWithCacheDir(n.lab.options.Plugins, filepath.Join(n.dir, "cni-cache"), nil), nil
}

// runtime is what a container runtime says of the pod.
func (p *Pod) runtime() *libcni.RuntimeConf {
	return &libcni.RuntimeConf{
		ContainerID: string(p.UID),
		NetNS:       filepath.Join(namespaces, p.namespace),
		IfName:      "eth0",
		Args: [][2]string{
			{"IgnoreUnknown", "1"},
			{"K8S_POD_NAMESPACE", p.Namespace},
			{"K8S_POD_NAME", p.Name},
			{"K8S_POD_UID", string(p.UID)},
			{"K8S_POD_INFRA_CONTAINER_ID", string(p.UID)},
		},
		CapabilityArgs: p.Capabilities,
	}
}

// file is the name of the object's file.
func (p *Pod) file() string { return "pod-" + p.Namespace + "-" + p.Name }

// object is the Pod object, with the addresses that are known.
func (p *Pod) object() *corev1.Pod {
	object := &corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: p.Namespace, Name: p.Name, UID: p.UID, Labels: p.Labels},
		Spec:       corev1.PodSpec{NodeName: p.Node.Name, Containers: []corev1.Container{{Name: "main", Image: "none"}}},
	}
	for _, address := range p.Addresses {
		object.Status.PodIPs = append(object.Status.PodIPs, corev1.PodIP{IP: address.String()})
	}
	return object
}

// Netns is the pod's network namespace.
func (p *Pod) Netns() ns.NetNS { return p.netns }
