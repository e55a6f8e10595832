//go:build e2e

package e2e

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"github.com/warren-cni/warren/pkg/ipam"
)

// account is what a node holds for its pods, by kind: addresses, or names of which only the number matters.
type account map[string][]string

// What a node holds that has one address for each of a pod's.
func addressKinds() []string { return []string{"lease", "route", "neighbour", "ready"} }

// What a node holds one of for each pod.
func podKinds() []string { return []string{"link", "netns", "result"} }

// accountScript prints what a node holds for its pods, a kind and a value on each line.
const accountScript = `
	ip -oneline link | sed -n 's/^[0-9]*: \(wrn[^:@]*\).*/link \1/p'
	{ ip -4 route show table all; ip -6 route show table all; } | awk '/ dev wrn/ && $1 !~ /^(fe80|ff00|multicast|local|anycast)/ {print "route", $1}'
	ip neigh show nud permanent | awk '$3 ~ /^wrn/ {print "neighbour", $1}'
	ipset save | awk '$1 == "add" && $2 ~ /^WARREN/ {print ($2 ~ /^WARREN-READY/ ? "ready" : "member"), $3}'
	{ iptables-save; ip6tables-save; } | awk '/^-A WARREN/ {for (i = 1; i < NF; i++) if ($i == "-s" || $i == "-d") print "rule", $(i+1)}'
	{ iptables-save -t nat; ip6tables-save -t nat; } | sed -n 's/^:\(CNI-DN-[^ ]*\).*/portmap \1/p'
	tc qdisc show | awk '$2 == "tbf" {print "tbf", $5}'
	ip -oneline link show type ifb | sed 's/^[0-9]*: \([^:@]*\).*/ifb \1/'
	ls /run/netns | sed 's/^/netns /'
	ls /var/lib/cni/results 2>/dev/null | sed -n 's/^warren-/result /p'
	ls /var/lib/cni/networks 2>/dev/null | sed 's/^/network /'
	true`

// holds reads what a node holds for its pods.
func (c *cluster) holds(ctx context.Context, node string) (account, error) {
	out, err := try(ctx, command{name: "docker", args: []string{"exec", node, "sh", "-c", accountScript}})
	if err != nil {
		return nil, err
	}
	has := account{}
	for line := range strings.Lines(out) {
		kind, value, _ := strings.Cut(strings.TrimSpace(line), " ")
		value = strings.TrimSuffix(strings.TrimSuffix(value, "/32"), "/128")
		has[kind] = append(has[kind], value)
	}
	leases, err := leasesOf(ctx, node)
	for _, lease := range leases {
		for _, address := range lease.Addresses {
			has["lease"] = append(has["lease"], address.String())
		}
	}
	for _, values := range has {
		slices.Sort(values)
	}
	return has, err
}

// leasesOf reads the leases of a node.
func leasesOf(ctx context.Context, node string) ([]ipam.Lease, error) {
	folder, err := os.MkdirTemp("", "leases")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(folder) //nolint:errcheck // a copy
	// docker cp does not see what is on a tmpfs.
	packed, err := try(ctx, command{name: "docker", args: []string{"exec", node, "tar", "-C", "/run/warren/ipam", "-c", "."}})
	if err != nil {
		return nil, err
	}
	archive := tar.NewReader(strings.NewReader(packed))
	for {
		header, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, err
		}
		name := filepath.Join(folder, filepath.Clean("/"+header.Name))
		if header.Typeflag == tar.TypeDir {
			err = os.MkdirAll(name, 0o700)
		} else if text, readErr := io.ReadAll(archive); header.Typeflag == tar.TypeReg {
			err = errors.Join(readErr, os.WriteFile(name, text, 0o600))
		} else if header.Typeflag == tar.TypeLink {
			err = os.Link(filepath.Join(folder, filepath.Clean("/"+header.Linkname)), name)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
	}
	store, err := ipam.Open(folder)
	if err != nil {
		return nil, err
	}
	return store.List()
}

// podsOn returns the pods of a node that have addresses of its podCIDRs.
func (c *cluster) podsOn(ctx context.Context, node string) ([]corev1.Pod, error) {
	list, err := c.client.CoreV1().Pods(metav1.NamespaceAll).List(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector("spec.nodeName", node).String(),
	})
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(list.Items, func(pod corev1.Pod) bool { return pod.Spec.HostNetwork }), nil
}

// accounted is an error unless a node holds for its pods exactly what they need, and nothing for others. It returns what it holds.
func (c *cluster) accounted(ctx context.Context, node string) (account, error) {
	pods, err := c.podsOn(ctx, node)
	if err != nil {
		return nil, err
	}
	has, err := c.holds(ctx, node)
	if err != nil {
		return nil, err
	}
	var addresses []string
	for _, pod := range pods {
		if !podReady(&pod) || pod.DeletionTimestamp != nil {
			err = errors.Join(err, fmt.Errorf("pod %s/%s is not ready, or ends", pod.Namespace, pod.Name))
		}
		for _, ip := range pod.Status.PodIPs {
			addresses = append(addresses, ip.IP)
		}
	}
	slices.Sort(addresses)
	for _, kind := range addressKinds() {
		if diff := cmp.Diff(addresses, has[kind]); diff != "" {
			err = errors.Join(err, fmt.Errorf("%s of node %s (-pods +node):\n%s", kind, node, diff))
		}
	}
	for _, kind := range podKinds() {
		if len(has[kind]) != len(pods) {
			err = errors.Join(err, fmt.Errorf("node %s has %d pods, and %s %q", node, len(pods), kind, has[kind]))
		}
	}
	return has, errors.Join(err, c.strangers(ctx, node, addresses, slices.Concat(has["member"], has["rule"])))
}

// strangers is an error where sets or rules name an address of a node's podCIDRs that is neither a pod's nor the node's own.
func (c *cluster) strangers(ctx context.Context, node string, addresses, named []string) error {
	object, err := c.client.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
	if err != nil {
		return err
	}
	for _, text := range object.Spec.PodCIDRs {
		prefix, parseErr := netip.ParsePrefix(text)
		if parseErr != nil {
			return parseErr
		}
		for _, name := range named {
			bare, _, _ := strings.Cut(name, ",")
			address, parseErr := netip.ParseAddr(bare)
			if parseErr != nil || !prefix.Contains(address) || address == prefix.Addr().Next() {
				continue
			}
			if !slices.Contains(addresses, bare) {
				err = errors.Join(err, fmt.Errorf("node %s has %s in a set or rule, which is no pod's", node, name))
			}
		}
	}
	return err
}

// balance is an account without names that differ from pod to pod: what must be equal before and after pods came and went.
func (a account) balance() map[string]int {
	numbers := map[string]int{}
	for kind, values := range a {
		numbers[kind] = len(values)
	}
	return numbers
}

// balance is an error unless each node holds what its pods need. It returns how much that is.
func (c *cluster) balance(ctx context.Context) (map[string]map[string]int, error) {
	all := map[string]map[string]int{}
	for _, node := range c.nodes() {
		has, err := c.accounted(ctx, node)
		if err != nil {
			return nil, err
		}
		all[node] = has.balance()
	}
	return all, nil
}

// balances waits until each node holds what its pods need, and returns how much that is.
func (c *cluster) balances(t *testing.T) (all map[string]map[string]int) {
	t.Helper()
	eventually(t, settle, "each node holds what its pods need", func(ctx context.Context) (err error) {
		all, err = c.balance(ctx)
		return err
	})
	return all
}

// checkBalances waits until each node holds what its pods need, which must be as much as before.
func (c *cluster) checkBalances(t *testing.T, before map[string]map[string]int) {
	t.Helper()
	eventually(t, settle, "the nodes hold as much as before", func(ctx context.Context) error {
		after, err := c.balance(ctx)
		if diff := cmp.Diff(before, after); err == nil && diff != "" {
			err = fmt.Errorf("(-before +after):\n%s", diff)
		}
		return err
	})
}

// kinds names what was counted.
func kinds(balances map[string]map[string]int) []string {
	all := map[string]bool{}
	for _, balance := range balances {
		for kind := range balance {
			all[kind] = true
		}
	}
	return slices.Sorted(maps.Keys(all))
}
