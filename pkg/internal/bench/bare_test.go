package bench

import (
	"context"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/containernetworking/plugins/pkg/testutils"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/lab"
)

// upstream is WireGuard's own program.
const upstream = "golang.zx2c4.com/wireguard"

// upstreamMTU is what that program gives its link.
const upstreamMTU = 1420

// stateful is the least that a node asks of its kernel which enforces policies, whoever writes the rules: it tracks connections, one rule
// lets pass what is established, another what a pod begins, and what pods send out of their network is translated.
const stateful = `
iptables -P FORWARD DROP
iptables -A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT
iptables -A FORWARD -i pod -j ACCEPT
iptables -A FORWARD -o pod -j ACCEPT
iptables -t nat -A POSTROUTING -s 10.244.0.0/16 ! -d 10.244.0.0/16 -j MASQUERADE
`

// newBare makes two nodes with WireGuard that is configured by hand, and a pod each, and returns the ways between the pods and
// between the nodes. The last of what makes a node is a script.
func newBare(b *testing.B, name string, uplink, mtu int, script string) map[string]*way {
	b.Helper()
	dir := b.TempDir()
	program := filepath.Join(dir, "wireguard-go")
	build := exec.CommandContext(b.Context(), "go", "build", "-o", program, upstream)
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("building %s: %v\n%s", upstream, err, out)
	}
	network, err := lab.New(b.Context(), lab.Options{Name: name, Dir: dir, Nodes: 2, UplinkMTUs: []int{uplink}})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := network.Close(context.Background()); err != nil {
			b.Error(err)
		}
	})
	if mtu == 0 {
		mtu = upstreamMTU
	}
	var keys []wgtypes.Key
	for range network.Nodes {
		key, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			b.Fatal(err)
		}
		keys = append(keys, key)
	}
	var pods []ns.NetNS
	var processes []int
	for i, node := range network.Nodes {
		pod, process := bareNode(b, node, i+1, mtu, program)
		if _, err := node.Run(b.Context(), "sh", "-ec", script); err != nil {
			b.Fatal(err)
		}
		pods, processes = append(pods, pod), append(processes, process)
		configureBare(b, filepath.Join(dir, node.Name, "wireguard", "wg0.sock"), keys, i, network.Nodes[1-i])
	}
	nodes := network.Nodes
	return map[string]*way{
		"pods":  newWay(b, &way{client: pods[0], server: pods[1], to: nodes[1].PodCIDRs[0].Addr().Next().Next(), processes: processes}),
		"nodes": newWay(b, &way{client: nodes[0].Netns(), server: nodes[1].Netns(), to: nodes[1].PodCIDRs[0].Addr().Next(), processes: processes}),
	}
}

// bareNode starts WireGuard on a node, and gives it addresses, routes and a pod.
func bareNode(b *testing.B, node *lab.Node, number, mtu int, program string) (pod ns.NetNS, process int) {
	b.Helper()
	pod, err := testutils.NewNS()
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = pod.Close()
		if err := testutils.UnmountNS(pod); err != nil {
			b.Error(err)
		}
	})
	tunnel, err := node.Start(b.Context(), "wireguard-go", nil, []string{program, "-f", "wg0"})
	if err != nil {
		b.Fatal(err)
	}
	other := 3 - number
	_, err = node.Run(b.Context(), "sh", "-ec", fmt.Sprintf(`
for try in $(seq 100); do [ ! -S /var/run/wireguard/wg0.sock ] || break; sleep 0.1; done
sysctl -qw net.ipv4.ip_forward=1
ip link set wg0 mtu %[3]d up
ip addr add 10.244.%[1]d.1/32 dev wg0
ip route add 10.244.%[2]d.0/24 dev wg0 src 10.244.%[1]d.1
ip link add pod mtu %[3]d type veth peer name eth0 mtu %[3]d netns %[4]s
ip link set pod up
ip route add 10.244.%[1]d.2/32 dev pod
sysctl -qw net.ipv4.conf.pod.proxy_arp=1
nsenter --net=%[4]s sh -ec 'ip link set lo up; ip link set eth0 up; ip addr add 10.244.%[1]d.2/32 dev eth0; ip route add default dev eth0'
`, number, other, mtu, pod.Path()))
	if err != nil {
		b.Fatal(err)
	}
	return pod, tunnel.PID()
}

// configureBare gives WireGuard its key and its one peer.
func configureBare(b *testing.B, socket string, keys []wgtypes.Key, own int, peer *lab.Node) {
	b.Helper()
	text := func(key wgtypes.Key) string { return hex.EncodeToString(key[:]) }
	c, err := new(net.Dialer).DialContext(b.Context(), "unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = c.Close() }()
	_, err = fmt.Fprintf(c, "set=1\nprivate_key=%s\nlisten_port=51820\npublic_key=%s\nendpoint=%s:51820\nallowed_ip=%s\npersistent_keepalive_interval=25\n\n",
		text(keys[own]), text(keys[1-own].PublicKey()), peer.Addresses[0], peer.PodCIDRs[0])
	if err == nil {
		err = c.(*net.UnixConn).CloseWrite()
	}
	answer, errRead := io.ReadAll(c)
	if err != nil || errRead != nil || !strings.Contains(string(answer), "errno=0") {
		b.Fatalf("configuring WireGuard at %s: %q, %v, %v", socket, answer, err, errRead)
	}
}
