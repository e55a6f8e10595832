package podlink_test

import (
	"errors"
	"io/fs"
	"net/netip"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/testnode"
)

// pair plans the link of a pod with the addresses 10.244.1.<n> and fd00::<n>.
func pair(n string) podlink.Pair {
	return podlink.Plan(podlink.Spec{
		ContainerID: "c" + n, Interface: "eth0", MTU: 1400,
		Addresses: []netip.Addr{netip.MustParseAddr("10.244.1." + n), netip.MustParseAddr("fd00::" + n)},
	})
}

// run runs a shell command in a namespace and returns its output.
func run(t *testing.T, in ns.NetNS, command string) string {
	t.Helper()
	var out []byte
	err := in.Do(func(ns.NetNS) (err error) {
		out, err = exec.Command("sh", "-ec", command).CombinedOutput()
		return err
	})
	if err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
	return string(out)
}

// state lists everything that Attach can make in a namespace.
func state(t *testing.T, in ns.NetNS) string {
	t.Helper()
	return run(t, in, "ip -br link; ip route show table all; ip -6 route show table all; ip neigh; ip -6 neigh")
}

func attach(t *testing.T, pod ns.NetNS, p podlink.Pair) {
	t.Helper()
	if err := podlink.Attach(pod.Path(), p); err != nil {
		t.Fatal(err)
	}
}

func TestPodsReachEachOther(t *testing.T) {
	node := testnode.Enter(t)
	one, two := testnode.New(t), testnode.New(t)
	run(t, node, "ip addr add 10.244.1.1/32 dev lo; ip addr add fd00::1/128 dev lo")
	attach(t, one, pair("2"))
	attach(t, two, pair("3"))
	// At once: no address is tentative, no neighbour unknown.
	run(t, one, "ping -c 1 -W 2 10.244.1.3; ping -c 1 -W 2 fd00::3")
	run(t, two, "ping -c 1 -W 2 10.244.1.2; ping -c 1 -W 2 fd00::2")
	run(t, node, "ping -c 1 -W 2 10.244.1.2; ping -c 1 -W 2 fd00::2")
	for pod, p := range map[ns.NetNS]podlink.Pair{one: pair("2"), two: pair("3")} {
		if err := podlink.Check(pod.Path(), p); err != nil {
			t.Errorf("check: %v", err)
		}
	}
	if links, err := podlink.Links(); err != nil || len(links) != 2 {
		t.Errorf("links: %v, %v; want 2", links, err)
	}
	if learned := run(t, node, "ip neigh show nud reachable; ip -6 neigh show nud reachable"); learned != "" {
		t.Errorf("neighbours were learned:\n%s", learned)
	}
}

// TestMACsAreSetAtCreation asks the kernel who chose the addresses: 3 is NET_ADDR_SET, which udev leaves alone.
func TestMACsAreSetAtCreation(t *testing.T) {
	node, pod := testnode.Enter(t), testnode.New(t)
	attach(t, pod, pair("2"))
	for name, in := range map[string]ns.NetNS{pair("2").Host.Name: node, "eth0": pod} {
		got := run(t, in, "unshare -m sh -ec 'mount -t sysfs none /sys; cat /sys/class/net/"+name+"/addr_assign_type'")
		if strings.TrimSpace(got) != "3" {
			t.Errorf("%s: addr_assign_type %q, want 3", name, got)
		}
	}
}

func TestIPv6SwitchedOffByDefault(t *testing.T) {
	node, pod := testnode.Enter(t), testnode.New(t)
	for _, in := range []ns.NetNS{node, pod} {
		run(t, in, "sysctl -qw net.ipv6.conf.all.disable_ipv6=1 net.ipv6.conf.default.disable_ipv6=1 net.ipv6.conf.all.forwarding=1")
	}
	run(t, node, "sysctl -qw net.ipv6.conf.lo.disable_ipv6=0; ip addr add fd00::1/128 dev lo")
	attach(t, pod, pair("2"))
	run(t, pod, "ping -c 1 -W 2 fd00::1")
}

func TestHostEndTakesNoAddressAndNoAdvertisement(t *testing.T) {
	node, pod := testnode.Enter(t), testnode.New(t)
	attach(t, pod, pair("2"))
	name := pair("2").Host.Name
	if got := run(t, node, "ip -6 addr show dev "+name); got != "" {
		t.Errorf("the host end has addresses:\n%s", got)
	}
	if got := run(t, node, "cat /proc/sys/net/ipv6/conf/"+name+"/accept_ra"); got != "0\n" {
		t.Errorf("accept_ra is %q", got)
	}
}

// TestAttachFailsWithoutTrace makes each step fail in turn.
func TestAttachFailsWithoutTrace(t *testing.T) {
	tests := map[string]struct {
		node, pod string // commands before the attempt
		change    func(*podlink.Pair)
		want      string
		exists    bool
	}{
		"interface exists": {pod: "ip link add eth0 type veth peer name other", want: "in the pod, eth0", exists: true},
		"host name exists": {node: "ip link add " + pair("2").Host.Name + " type veth peer name other", want: pair("2").Host.Name, exists: true},
		"MTU out of range": {change: func(p *podlink.Pair) { p.MTU = 70000 }, want: "making the devices"},
		"unknown sysctl":   {change: func(p *podlink.Pair) { p.Host.Sysctls[0].Name = "none" }, want: "setting none"},
		"pod's sysctl":     {change: func(p *podlink.Pair) { p.Pod.Sysctls[0].Name = "none" }, want: "setting none"},
		"host route":       {change: func(p *podlink.Pair) { p.Host.Routes[0].Destination = netip.MustParsePrefix("10.0.0.1/8") }, want: "adding route 10.0.0.1/8"},
		"address twice":    {change: func(p *podlink.Pair) { p.Pod.Addresses = append(p.Pod.Addresses, p.Pod.Addresses...) }, want: "adding address 10.244.1.2/32", exists: true},
		"neighbour":        {change: func(p *podlink.Pair) { p.Pod.Neighbours[1].Address = netip.Addr{} }, want: "adding neighbour invalid IP"},
		"pod has a default route": {
			pod:  "ip link add other type veth peer name other2; ip addr add 192.168.9.2/24 dev other; ip link set other up; ip route add default via 192.168.9.1",
			want: "adding route 0.0.0.0/0", exists: true,
		},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			node, pod := testnode.Enter(t), testnode.New(t)
			run(t, node, tt.node+"\n:")
			run(t, pod, tt.pod+"\n:")
			beforeNode, beforePod := state(t, node), state(t, pod)
			p := pair("2")
			if tt.change != nil {
				tt.change(&p)
			}
			err := podlink.Attach(pod.Path(), p)
			if err == nil || !strings.Contains(err.Error(), tt.want) || errors.Is(err, fs.ErrExist) != tt.exists {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
			if after := state(t, node); after != beforeNode {
				t.Errorf("node before:\n%s\nafter:\n%s", beforeNode, after)
			}
			if after := state(t, pod); after != beforePod {
				t.Errorf("pod before:\n%s\nafter:\n%s", beforePod, after)
			}
		})
	}
}

func TestAttachToNoNamespace(t *testing.T) {
	testnode.Enter(t)
	for _, path := range []string{filepath.Join(t.TempDir(), "none"), t.TempDir()} {
		if err := podlink.Attach(path, pair("2")); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("got %v, want an error that names %s", err, path)
		}
	}
	if links, err := podlink.Links(); err != nil || len(links) > 0 {
		t.Errorf("links %v, %v", links, err)
	}
}

// TestNewestPodHasTheRoute: a left-over link does not keep an address from its next pod.
func TestNewestPodHasTheRoute(t *testing.T) {
	node := testnode.Enter(t)
	left, next := testnode.New(t), testnode.New(t)
	attach(t, left, pair("2"))
	p := pair("2")
	p.Host.Name = podlink.HostName("next", "eth0")
	attach(t, next, p)
	for _, dst := range []string{"10.244.1.2", "fd00::2"} {
		if got := run(t, node, "ip route get "+dst); !strings.Contains(got, p.Host.Name) {
			t.Errorf("route to %s: %s", dst, got)
		}
	}
}

// TestCheckSeesEveryCorruption breaks one thing at a time.
func TestCheckSeesEveryCorruption(t *testing.T) {
	host := pair("2").Host.Name
	tests := map[string]struct {
		node, pod, want string
	}{
		"host end down":         {node: "ip link set " + host + " down", want: host + ": it is down"},
		"pod's end down":        {pod: "ip link set eth0 down", want: "eth0: it is down"},
		"host MTU":              {node: "ip link set " + host + " mtu 1300", want: host + ": its MTU is 1300, not 1400"},
		"pod's MTU":             {pod: "ip link set eth0 mtu 1300", want: "eth0: its MTU is 1300, not 1400"},
		"host MAC":              {node: "ip link set " + host + " address 02:00:00:00:00:01", want: host + ": its MAC address is 02:00:00:00:00:01"},
		"pod's MAC":             {pod: "ip link set eth0 address 02:00:00:00:00:01", want: "eth0: its MAC address is 02:00:00:00:00:01"},
		"IPv4 address":          {pod: "ip addr del 10.244.1.2/32 dev eth0", want: "address 10.244.1.2/32 is missing"},
		"IPv6 address":          {pod: "ip addr del fd00::2/128 dev eth0", want: "address fd00::2/128 is missing"},
		"host IPv4 neighbour":   {node: "ip neigh del 10.244.1.2 dev " + host, want: "permanent neighbour 10.244.1.2"},
		"host IPv6 neighbour":   {node: "ip neigh del fd00::2 dev " + host, want: "permanent neighbour fd00::2"},
		"pod's IPv4 neighbour":  {pod: "ip neigh del 169.254.1.1 dev eth0", want: "permanent neighbour 169.254.1.1"},
		"pod's IPv6 neighbour":  {pod: "ip neigh del fe80::1 dev eth0", want: "permanent neighbour fe80::1"},
		"neighbour's MAC":       {pod: "ip neigh replace fe80::1 lladdr 02:00:00:00:00:01 nud permanent dev eth0", want: "permanent neighbour fe80::1"},
		"host IPv4 route":       {node: "ip route del 10.244.1.2/32", want: "route 10.244.1.2/32 is missing"},
		"host IPv6 route":       {node: "ip route del fd00::2/128", want: "route fd00::2/128 is missing"},
		"IPv4 default route":    {pod: "ip route del default", want: "route 0.0.0.0/0 is missing"},
		"IPv6 default route":    {pod: "ip -6 route del default", want: "route ::/0 is missing"},
		"better IPv6 route":     {node: "ip link set lo up; ip -6 route add fd00::2/128 dev lo metric 1", want: "packets to fd00::2 take another route, by lo"},
		"IPv6 route to nothing": {node: "ip -6 route add unreachable fd00::2/128 metric 1", want: "packets to fd00::2 take"},
		"rule for IPv4":         {node: "ip rule add to 10.244.1.2 blackhole", want: "packets to 10.244.1.2 take no route"},
		"rule for IPv6":         {node: "ip link set lo up; ip -6 route add default dev lo table 7; ip -6 rule add to fd00::2 lookup 7", want: "packets to fd00::2 take another route, by lo"},
		"node has the address":  {node: "ip addr add 10.244.1.2/32 dev lo", want: "packets to 10.244.1.2 take another route, by lo"},
		"no device":             {node: "ip link del " + host, want: host},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			node, pod := testnode.Enter(t), testnode.New(t)
			attach(t, pod, pair("2"))
			if err := podlink.Check(pod.Path(), pair("2")); err != nil {
				t.Fatalf("before the corruption: %v", err)
			}
			run(t, node, tt.node+"\n:")
			run(t, pod, tt.pod+"\n:")
			if err := podlink.Check(pod.Path(), pair("2")); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

func BenchmarkAttachDetach(b *testing.B) {
	testnode.Enter(b)
	pod := testnode.New(b)
	p := pair("2")
	for b.Loop() {
		if err := podlink.Attach(pod.Path(), p); err != nil {
			b.Fatal(err)
		}
		if err := errors.Join(podlink.Detach(p.Host.Name), podlink.Sweep()); err != nil {
			b.Fatal(err)
		}
	}
}

// A link whose MTU is too small for IPv6 has none, and wires a pod that needs none.
func TestSmallMTU(t *testing.T) {
	testnode.Enter(t)
	for i, mtu := range []int{576, 1279, 1280} {
		n := strconv.Itoa(i + 2)
		spec := podlink.Spec{ContainerID: "small" + n, Interface: "eth0", MTU: mtu, Addresses: []netip.Addr{netip.MustParseAddr("10.244.1." + n)}}
		pod, p := testnode.New(t), podlink.Plan(spec)
		attach(t, pod, p)
		if err := podlink.Check(pod.Path(), p); err != nil {
			t.Errorf("MTU %d: %v", mtu, err)
		}
		run(t, pod, "ip -4 addr show dev eth0 | grep -q 10.244.1."+n)
		spec.ContainerID, spec.Addresses = "dual"+n, append(spec.Addresses, netip.MustParseAddr("fd00::"+n))
		if err := podlink.Attach(testnode.New(t).Path(), podlink.Plan(spec)); (err != nil) != (mtu < 1280) {
			t.Errorf("MTU %d, with an IPv6 address: %v", mtu, err)
		}
	}
}
