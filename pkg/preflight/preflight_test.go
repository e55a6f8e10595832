package preflight_test

import (
	"errors"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/preflight"
)

func prefixes(texts ...string) []netip.Prefix {
	var all []netip.Prefix
	for _, text := range texts {
		all = append(all, netip.MustParsePrefix(text))
	}
	return all
}

// wanted is Warren in dual stack with its defaults.
func wanted() preflight.Wanted {
	return preflight.Wanted{
		ClusterCIDRs: prefixes("10.244.0.0/16", "fd00:10:244::/56"), ServiceCIDRs: prefixes("10.96.0.0/12"),
		Encrypted: true, Port: 51820, Conflist: "/etc/cni/net.d/10-warren.conflist",
	}
}

func value[T any](v T) preflight.Reading[T] { return preflight.Reading[T]{Value: v} }

// healthy is a node on which Warren runs: with kube-proxy, node-local DNS, Docker, and a VPN.
func healthy() preflight.Facts {
	return preflight.Facts{
		Kernel: value("6.1.0-18-amd64"), WireGuard: value(true), TUN: value(true),
		Filter: value(preflight.Filter{
			Chains: []string{"CNI-HOSTPORT-DNAT", "DOCKER", "KUBE-IPTABLES-HINT", "KUBE-SERVICES"}, Tables: []string{"filter", "kube-proxy", "mangle", "nat"},
		}),
		Forwarding: value(preflight.Forwarding{IPv4: true, IPv6: true}),
		Advertised: value([]preflight.Advertised{{Link: "eth0", AcceptRA: "2"}}),
		Links: value([]preflight.Link{
			{Name: "lo", Up: true, MTU: 65536, Addresses: prefixes("127.0.0.1/8", "::1/128")},
			{Name: "eth0", Type: "device", Up: true, MTU: 1500, Addresses: prefixes("192.0.2.1/24", "2001:db8::1/64", "fe80::1/64")},
			{Name: "docker0", Type: "bridge", MTU: 1500, Addresses: prefixes("172.17.0.1/16")},
			{Name: "nodelocaldns", Type: "dummy", MTU: 1500, Addresses: prefixes("169.254.20.10/32", "10.96.0.10/32")},
			{Name: "tun0", Type: "tuntap", Up: true, MTU: 1300, Addresses: prefixes("198.51.100.5/24")},
			{Name: "warren0", Type: "wireguard", Up: true, MTU: 1440, Addresses: prefixes("10.244.1.0/32")},
			{Name: "wrn0123456789", Type: "veth", Up: true, MTU: 1440},
		}),
		Routes: value([]preflight.Route{
			{Destination: netip.MustParsePrefix("0.0.0.0/0"), Link: "eth0"},
			{Destination: netip.MustParsePrefix("::/0"), Link: "eth0"},
			{Destination: netip.MustParsePrefix("192.0.2.0/24"), Link: "eth0"},
			{Destination: netip.MustParsePrefix("172.17.0.0/16"), Link: "docker0"},
			{Destination: netip.MustParsePrefix("10.244.2.0/24"), Link: "warren0"},
			{Destination: netip.MustParsePrefix("10.244.1.2/32"), Link: "wrn0123456789"},
			{Destination: netip.MustParsePrefix("198.51.100.0/24"), Link: "tun0"},
		}),
		Programs: value([]string{"NetworkManager", "containerd", "kubelet", "systemd", "systemd-network"}),
		Networkd: value([]string{"#ManageForeignRoutes=yes\n[Network]\nManageForeignRoutes = no\nManageForeignRoutingPolicyRules=false\n"}),
		NetworkManager: value([]string{
			"[keyfile]\nunmanaged-devices=type:wifi\n", "[main]\nplugins=keyfile\n\n[keyfile]\nunmanaged-devices+=interface-name:wrn*;interface-name:warren0\n",
		}),
		Directories: value([]preflight.Directory{
			{Path: "/opt/cni/bin", Flag: "--cni-bin-dir", ForBinaries: true},
			{Path: "/etc/cni/net.d", Flag: "--cni-conf-dir", NoExec: true},
			{Path: "/run/warren", Flag: "--run-dir", ForBoot: true, Memory: true},
			{Path: "/var/lib/warren", Flag: "--state-dir"},
		}),
	}
}

// addLink adds a link to the facts.
func addLink(f *preflight.Facts, name, kind string, addresses ...string) {
	f.Links.Value = append(f.Links.Value, preflight.Link{Name: name, Type: kind, Up: true, MTU: 1500, Addresses: prefixes(addresses...)})
}

func addRoute(f *preflight.Facts, destination, link string) {
	f.Routes.Value = append(f.Routes.Value, preflight.Route{Destination: netip.MustParsePrefix(destination), Link: link})
}

func addChain(f *preflight.Facts, names ...string) {
	f.Filter.Value.Chains = append(f.Filter.Value.Chains, names...)
}

// findings are in short: severity, code, object.
func findings(results []preflight.Result) []string {
	var found []string
	for _, r := range results {
		for _, f := range r.Findings {
			found = append(found, string(f.Severity)+" "+f.Code+" "+f.Object)
		}
	}
	return found
}

func TestHealthy(t *testing.T) {
	for name, change := range map[string]func(*preflight.Facts, *preflight.Wanted){
		"a running node": func(*preflight.Facts, *preflight.Wanted) {},
		"before the installation": func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Links.Value, f.Routes.Value = f.Links.Value[:5], f.Routes.Value[:4]
		},
		"a user-space tunnel": func(f *preflight.Facts, _ *preflight.Wanted) {
			f.WireGuard.Value, f.TUN.Value = false, false
		},
		"user space alone": func(f *preflight.Facts, w *preflight.Wanted) { w.UserSpaceOnly, f.WireGuard.Value = true, false },
		"encryption off":   func(f *preflight.Facts, w *preflight.Wanted) { w.Encrypted, f.WireGuard.Value = false, false },
		"IPv4 alone on a small MTU": func(f *preflight.Facts, w *preflight.Wanted) {
			w.ClusterCIDRs, f.Links.Value[1].MTU, f.Forwarding.Value.IPv6 = w.ClusterCIDRs[:1], 1300, false
		},
		"nothing is managed": func(f *preflight.Facts, _ *preflight.Wanted) { f.Programs.Value = []string{"init"} },
		"all unmanaged": func(f *preflight.Facts, _ *preflight.Wanted) {
			f.NetworkManager.Value = []string{"[keyfile]\nunmanaged-devices=*\n"}
		},
		"types unmanaged": func(f *preflight.Facts, _ *preflight.Wanted) {
			f.NetworkManager.Value = []string{"[keyfile]\nunmanaged-devices=type:veth;type:wireguard\n"}
		},
		"networkd's other way to say no": func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Networkd.Value = []string{"[Network]\nManageForeignRoutes=n\nManageForeignRoutingPolicyRules=F\n"}
		},
		"a way out that is there if all else fails": func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Routes.Value = append(f.Routes.Value,
				preflight.Route{Destination: netip.MustParsePrefix("0.0.0.0/0"), Link: "tun0", Metric: 600},
				preflight.Route{Destination: netip.MustParsePrefix("::/0"), Link: "tun0", Metric: 600})
			f.Links.Value[4].MTU = 1200
		},
		"ufw disabled, its empty chains linger": func(f *preflight.Facts, _ *preflight.Wanted) {
			addChain(f, "ufw-before-input", "ufw-before-logging-forward", "ufw-track-output", "ufw6-before-input")
		},
		"ufw without IPv6, in a cluster without": func(f *preflight.Facts, w *preflight.Wanted) {
			addChain(f, "ufw-user-input")
			w.ClusterCIDRs, w.Encrypted = w.ClusterCIDRs[:1], false
			f.UFW.Value = []string{"IPV6=no\nDEFAULT_FORWARD_POLICY=\"ACCEPT\"\n", "-A ufw-user-input -s 10.244.0.0/16 -j ACCEPT\n"}
		},
		"routes that networkd takes care of": func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Advertised.Value[0].AcceptRA = "0"
		},
	} {
		f, w := healthy(), wanted()
		change(&f, &w)
		results := preflight.Check(f, w)
		for _, r := range results {
			if len(r.Findings)+len(r.NotChecked) > 0 {
				t.Errorf("%s: %s: %+v, not checked: %q", name, r.Check, r.Findings, r.NotChecked)
			}
		}
	}
}

// TestFindings spoils one thing at a time and wants that finding and no other.
func TestFindings(t *testing.T) {
	refusal := errors.New("no such file or directory")
	type change func(*preflight.Facts, *preflight.Wanted)
	for name, c := range map[string]struct {
		change change
		want   string
		// says are words of the message or the remedy.
		says string
	}{
		"old kernel": {func(f *preflight.Facts, _ *preflight.Wanted) { f.Kernel.Value = "5.4.0-150-generic" }, "warning KernelOld Linux 5.4.0-150-generic", "5.10"},
		"no WireGuard": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.WireGuard.Value, f.Links.Value = false, f.Links.Value[:5]
		}, "warning NoWireGuard kernel module wireguard", "userspace-tunnel.yaml"},
		"no tunnel at all": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.WireGuard.Value, f.TUN.Value, f.Links.Value = false, false, f.Links.Value[:5]
		}, "error NoWireGuard kernel modules wireguard and tun", "modprobe tun"},
		"user space alone without TUN": {func(f *preflight.Facts, w *preflight.Wanted) {
			w.UserSpaceOnly, f.TUN.Value, f.Links.Value = true, false, f.Links.Value[:5]
		}, "error NoTUN kernel module tun", "modprobe tun"},
		"the kernel's alone without it": {func(f *preflight.Facts, w *preflight.Wanted) {
			w.KernelOnly, f.WireGuard.Value, f.Links.Value = true, false, f.Links.Value[:5]
		}, "error NoWireGuard kernel module wireguard", "--wireguard=auto"},
		"another link of that name": {func(f *preflight.Facts, _ *preflight.Wanted) { f.Links.Value[5].Type = "bridge" }, "error LinkTaken link warren0", "bridge"},
		"no xt_set": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Lacks.Value = []preflight.Lack{{Feature: "match set (ipv4)", Module: "xt_set", Err: refusal}}
		}, "error PacketFilterLacks match set (ipv4)", "modprobe xt_set"},
		"both backends": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Filter.Value.Problems = []cluster.Problem{{Code: "BackendsMixed", Object: "iptables", Message: "both", Remedy: "choose"}}
		}, "warning BackendsMixed iptables", "choose"},
		"IPv4 forwarding off": {func(f *preflight.Facts, _ *preflight.Wanted) { f.Forwarding.Value.IPv4 = false }, "note ForwardingOff sysctl net.ipv4.ip_forward", "/etc/sysctl.d"},
		"IPv6 forwarding off": {func(f *preflight.Facts, _ *preflight.Wanted) { f.Forwarding.Value.IPv6 = false }, "note ForwardingOff sysctl net.ipv6.conf.all.forwarding", "/etc/sysctl.d"},
		"advertised default route": {
			func(f *preflight.Facts, _ *preflight.Wanted) { f.Advertised.Value[0].AcceptRA = "1" },
			"warning RouterAdvertisements sysctl net.ipv6.conf.eth0.accept_ra", "net.ipv6.conf.eth0.accept_ra=2",
		},
		"advertised default route on a VLAN": {
			func(f *preflight.Facts, _ *preflight.Wanted) {
				f.Advertised.Value[0] = preflight.Advertised{Link: "eth0.7", AcceptRA: "1"}
			}, "warning RouterAdvertisements sysctl net.ipv6.conf.eth0/7.accept_ra", "eth0/7",
		},
		"port taken": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Sockets.Value = []preflight.Socket{{Address: netip.MustParseAddrPort("0.0.0.0:51820"), Holder: "other (process 7)"}}
		}, "error PortTaken UDP port 51820", "other (process 7)"},
		"small uplink by its metric": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Routes.Value[1].Metric = 600
			f.Routes.Value = append(f.Routes.Value, preflight.Route{Destination: netip.MustParsePrefix("::/0"), Link: "tun0", Metric: 100})
		}, "error MTUTooSmall link tun0", "1240"},
		"small uplink": {func(f *preflight.Facts, _ *preflight.Wanted) { f.Links.Value[1].MTU = 1300 }, "error MTUTooSmall link eth0", "1240"},
		"large --mtu":  {func(_ *preflight.Facts, w *preflight.Wanted) { w.MTU = 1500 }, "warning MTUTooLarge --mtu=1500", "1440"},
		"pods and Services overlap": {
			func(_ *preflight.Facts, w *preflight.Wanted) { w.ServiceCIDRs = prefixes("10.244.128.0/20") },
			"error NetworksOverlap --cluster-cidr=10.244.0.0/16", "10.244.128.0/20",
		},
		"nodes and Services overlap": {
			func(_ *preflight.Facts, w *preflight.Wanted) { w.NodeCIDRs = prefixes("10.100.0.0/24") },
			"error NetworksOverlap --service-cidr=10.96.0.0/12", "10.100.0.0/24",
		},
		"the node is among the pods": {
			func(f *preflight.Facts, _ *preflight.Wanted) {
				f.Links.Value[1].Addresses = prefixes("10.244.9.9/24")
				addRoute(f, "10.244.9.0/24", "eth0")
			}, "error NetworkHoldsNode --cluster-cidr=10.244.0.0/16", "10.244.9.9 on eth0",
		},
		"the node is among the Services": {
			func(f *preflight.Facts, _ *preflight.Wanted) { f.Links.Value[1].Addresses = prefixes("10.100.9.9/24") },
			"error NetworkHoldsNode --service-cidr=10.96.0.0/12", "--service-cidr",
		},
		"a VPN to the pods' network": {
			func(f *preflight.Facts, _ *preflight.Wanted) {
				addRoute(f, "10.0.0.0/8", "tun0")
				f.Links.Value[4].Up = true
			},
			"warning NetworkOverlapsRoute --cluster-cidr=10.244.0.0/16, warning NetworkOverlapsRoute --service-cidr=10.96.0.0/12", "10.0.0.0/8 by tun0",
		},
		"another conflist": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Ahead.Value = []preflight.Ahead{{Path: "/etc/cni/net.d/05-cilium.conflist"}}
		}, "error NetworkAhead /etc/cni/net.d/05-cilium.conflist", "instead of 10-warren.conflist"},
		"a broken conflist": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Ahead.Value = []preflight.Ahead{{Path: "/etc/cni/net.d/00-x.conf", Err: refusal}}
		}, "error NetworkAhead /etc/cni/net.d/00-x.conf", refusal.Error()},
		"Multus": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Ahead.Value = []preflight.Ahead{{Path: "/etc/cni/net.d/00-multus.conf", Delegates: true}}
		}, "note NetworkAhead /etc/cni/net.d/00-multus.conf", "calls Warren"},
		"flannel's links": {func(f *preflight.Facts, _ *preflight.Wanted) {
			addLink(f, "flannel.1", "vxlan", "10.244.1.0/32")
			addRoute(f, "10.244.2.0/24", "flannel.1")
		}, "warning OtherCNILinks link flannel.1", "flannel"},
		"cni0": {func(f *preflight.Facts, _ *preflight.Wanted) {
			addLink(f, "cni0", "bridge", "10.244.1.1/24")
		}, "warning OtherCNILinks link cni0", "reboot"},
		"Calico's links": {func(f *preflight.Facts, _ *preflight.Wanted) {
			addLink(f, "cali0000000001", "veth")
			addLink(f, "cali0000000002", "veth")
			addLink(f, "vxlan.calico", "vxlan")
			addLink(f, "cali0000000003", "veth")
		}, "warning OtherCNILinks links cali0000000001, cali0000000002, cali0000000003 and 1 more", "Calico"},
		"Cilium's link":    {func(f *preflight.Facts, _ *preflight.Wanted) { addLink(f, "cilium_host", "veth", "10.244.1.7/32") }, "warning OtherCNILinks link cilium_host", "Cilium"},
		"Calico's chains":  {func(f *preflight.Facts, _ *preflight.Wanted) { addChain(f, "cali-FORWARD") }, "warning OtherCNIRules chain cali-FORWARD", "Calico"},
		"Cilium's chains":  {func(f *preflight.Facts, _ *preflight.Wanted) { addChain(f, "CILIUM_FORWARD", "OLD") }, "warning OtherCNIRules chain CILIUM_FORWARD", "Cilium"},
		"flannel's chains": {func(f *preflight.Facts, _ *preflight.Wanted) { addChain(f, "FLANNEL-POSTRTG") }, "warning OtherCNIRules chain FLANNEL-POSTRTG", "flannel"},
		"kube-router's chains": {func(f *preflight.Facts, _ *preflight.Wanted) {
			addChain(f, "KUBE-ROUTER-FORWARD", "KUBE-NWPLCY-DEFAULT")
		}, "warning OtherCNIRules chains KUBE-NWPLCY-DEFAULT, KUBE-ROUTER-FORWARD", "kube-router"},
		"firewalld runs":    {func(f *preflight.Facts, _ *preflight.Wanted) { f.Programs.Value = []string{"firewalld"} }, "warning Firewalld firewalld", "--add-port=51820/udp"},
		"firewalld's table": {func(f *preflight.Facts, _ *preflight.Wanted) { f.Filter.Value.Tables = []string{"firewalld"} }, "warning Firewalld firewalld", "--add-source=10.244.0.0/16"},
		"ufw":               {func(f *preflight.Facts, _ *preflight.Wanted) { addChain(f, "ufw-before-input", "ufw-user-input") }, "warning UFW ufw", "ufw allow 51820/udp"},
		"ufw in IPv6 alone": {func(f *preflight.Facts, _ *preflight.Wanted) { addChain(f, "ufw6-before-input", "ufw6-user-input") }, "warning UFW ufw", "ufw disable"},
		"firewalld, told half": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Programs.Value = []string{"firewalld"}
			f.Firewalld.Value = preflight.Zones{
				Trusted: `<zone target="ACCEPT"><source address="10.244.0.0/16"/><rule><source address="fd00:10:244::/56"/></rule></zone>`,
				Default: `<zone><port protocol="udp" port="51820"/></zone>`,
			}
		}, "warning Firewalld firewalld", "or let Warren pass: firewall-cmd --permanent --zone=trusted --add-source=fd00:10:244::/56; firewall-cmd --reload"},
		"ufw, told half": {func(f *preflight.Facts, _ *preflight.Wanted) {
			addChain(f, "ufw-before-input", "ufw-user-input")
			f.UFW.Value = []string{"DEFAULT_FORWARD_POLICY=\"ACCEPT\"\n", "# -A ufw-user-input -s 10.244.0.0/16 -j ACCEPT\n-A ufw-user-input -p udp --dport 51820 -j ACCEPT\n"}
		}, "warning UFW ufw", "or let Warren pass: ufw allow from 10.244.0.0/16; ufw allow from fd00:10:244::/56"},
		"ufw, nothing to encrypt": {func(f *preflight.Facts, w *preflight.Wanted) {
			addChain(f, "ufw-before-input", "ufw-user-input")
			w.Encrypted = false
		}, "warning UFW ufw", "ufw disable, or let Warren pass: ufw default allow routed; ufw allow from 10.244.0.0/16; ufw allow from fd00:10:244::/56"},
		"ufw without IPv6": {func(f *preflight.Facts, _ *preflight.Wanted) {
			addChain(f, "ufw-user-input")
			f.UFW.Value = []string{"IPV6=no\nDEFAULT_FORWARD_POLICY=\"ACCEPT\"\n", "-A ufw-user-input -s 10.244.0.0/16 -j ACCEPT\n"}
		}, "warning UFW ufw", "or let Warren pass: set IPV6=yes in /etc/default/ufw; ufw reload; ufw allow from fd00:10:244::/56; ufw allow 51820/udp"},
		"ufw without IPv6, told all else": {func(f *preflight.Facts, w *preflight.Wanted) {
			addChain(f, "ufw-user-input")
			w.Encrypted = false
			f.UFW.Value = []string{
				"IPV6=\"No\"\nDEFAULT_FORWARD_POLICY=\"ACCEPT\"\n",
				"-A ufw-user-input -s 10.244.0.0/16 -j ACCEPT\n", "-A ufw6-user-input -s fd00:10:244::/56 -j ACCEPT\n",
			}
		}, "warning UFW ufw", "or let Warren pass: set IPV6=yes in /etc/default/ufw; ufw reload"},
		"networkd": {
			func(f *preflight.Facts, _ *preflight.Wanted) { f.Networkd.Value = nil }, "warning NetworkdManagesRoutes systemd-networkd",
			`[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n`,
		},
		"networkd's rules": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Networkd.Value = append(f.Networkd.Value, "[Network]\nManageForeignRoutingPolicyRules=yes\n[DHCPv4]\nManageForeignRoutes=yes\n")
		}, "warning NetworkdManagesRoutes systemd-networkd", `[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n`},
		"NetworkManager": {func(f *preflight.Facts, _ *preflight.Wanted) { f.NetworkManager.Value = nil }, "warning NetworkManagerManagesLinks NetworkManager", "unmanaged-devices+=interface-name:wrn*;interface-name:warren0"},
		"NetworkManager and a tunnel of another type": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.WireGuard.Value, f.NetworkManager.Value = false, []string{"[keyfile]\nunmanaged-devices=type:veth;type:wireguard\n"}
		}, "warning NetworkManagerManagesLinks NetworkManager", "unmanaged-devices+="},
		"NetworkManager and a tunnel that is to be in user space": {func(f *preflight.Facts, w *preflight.Wanted) {
			w.UserSpaceOnly, f.NetworkManager.Value = true, []string{"[keyfile]\nunmanaged-devices=type:veth;type:wireguard\n"}
		}, "warning NetworkManagerManagesLinks NetworkManager", "unmanaged-devices+="},
		"NetworkManager overridden": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.NetworkManager.Value = append(f.NetworkManager.Value, "[keyfile]\nunmanaged-devices=interface-name:wrn*\n")
		}, "warning NetworkManagerManagesLinks NetworkManager", "conf.d/90-warren.conf"},
		"NetworkManager with an exception": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.NetworkManager.Value = []string{"[keyfile]\nunmanaged-devices=*,except:interface-name:warren*\n"}
		}, "warning NetworkManagerManagesLinks NetworkManager", "addresses"},
		"ipvs": {func(f *preflight.Facts, _ *preflight.Wanted) { f.IPVS.Value = true }, "error KubeProxyIPVS link kube-ipvs0", "kube-proxy --cleanup"},
		"read-only": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Directories.Value[0].Problem = "write /opt/cni/bin: read-only file system"
		}, "error DirectoryNotWritable /opt/cni/bin", "--cni-bin-dir"},
		"noexec":            {func(f *preflight.Facts, _ *preflight.Wanted) { f.Directories.Value[0].NoExec = true }, "error DirectoryNoExec /opt/cni/bin", "noexec"},
		"run dir on a disk": {func(f *preflight.Facts, _ *preflight.Wanted) { f.Directories.Value[2].Memory = false }, "warning RunDirOutlivesBoot /run/warren", "pods are refused until then"},
		"admission policies": {func(f *preflight.Facts, _ *preflight.Wanted) {
			f.Admission.Value = []cluster.Problem{{Code: "AdmissionPolicyMissing", Object: "ValidatingAdmissionPolicy x", Message: "m", Remedy: "apply it"}}
		}, "warning AdmissionPolicyMissing ValidatingAdmissionPolicy x", "apply it"},
	} {
		f, w := healthy(), wanted()
		c.change(&f, &w)
		results := preflight.Check(f, w)
		if diff := cmp.Diff(c.want, strings.Join(findings(results), ", ")); diff != "" {
			t.Errorf("%s (-want +got):\n%s", name, diff)
		}
		for _, r := range results {
			for _, found := range r.Findings {
				if !strings.Contains(found.Message+found.Remedy, c.says) || found.Message == "" || found.Remedy == "" {
					t.Errorf("%s: %q, remedy %q do not say %q", name, found.Message, found.Remedy, c.says)
				}
			}
			if len(r.NotChecked) > 0 {
				t.Errorf("%s: %s is not checked: %q", name, r.Check, r.NotChecked)
			}
		}
	}
}

// TestLastingSettings follows all remedies for settings of one node: none takes away what another has written.
func TestLastingSettings(t *testing.T) {
	f := healthy()
	f.Forwarding.Value = preflight.Forwarding{}
	f.Advertised.Value = []preflight.Advertised{{Link: "eth0", AcceptRA: "1"}, {Link: "eth1.7", AcceptRA: "1"}}
	dir := t.TempDir()
	for _, r := range preflight.Check(f, wanted()) {
		for _, found := range r.Findings {
			_, command, ok := strings.Cut(found.Remedy, "make it lasting: ")
			command, _, _ = strings.Cut(command, ", ")
			if command = strings.ReplaceAll(command, "/etc/sysctl.d", dir); !ok || !strings.Contains(command, dir) {
				t.Fatalf("%s: remedy %q", found.Object, found.Remedy)
			}
			if out, err := exec.CommandContext(t.Context(), "sh", "-ec", command).CombinedOutput(); err != nil {
				t.Fatalf("%s: %v: %s", command, err, out)
			}
		}
	}
	var lines []string
	for _, file := range []string{"99-warren.conf", "99-warren-ra.conf"} {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			t.Fatal(err)
		}
		lines = append(lines, strings.Fields(string(text))...)
	}
	want := []string{
		"net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1",
		"net.ipv6.conf.eth0.accept_ra=2", "net.ipv6.conf.eth1/7.accept_ra=2",
	}
	if diff := cmp.Diff(want, lines); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

// TestNotChecked lets each reading fail in turn: that is no finding, and what depends on it says why it was not checked.
func TestNotChecked(t *testing.T) {
	denied := errors.New("permission denied")
	for name, c := range map[string]struct {
		change func(*preflight.Facts)
		want   []string
	}{
		"kernel":      {func(f *preflight.Facts) { f.Kernel.Err = denied }, []string{"kernel"}},
		"release":     {func(f *preflight.Facts) { f.Kernel.Value = "none" }, []string{"kernel"}},
		"WireGuard":   {func(f *preflight.Facts) { f.WireGuard.Err = denied }, []string{"WireGuard"}},
		"TUN alone":   {func(f *preflight.Facts) { f.TUN.Err = denied }, nil}, // nobody needs it
		"rules":       {func(f *preflight.Facts) { f.Lacks.Err = denied }, []string{"packet filter"}},
		"filter":      {func(f *preflight.Facts) { f.Filter.Err = denied }, []string{"iptables backend", "other CNIs", "firewalls"}},
		"forwarding":  {func(f *preflight.Facts) { f.Forwarding.Err = denied }, []string{"forwarding"}},
		"advertised":  {func(f *preflight.Facts) { f.Advertised.Err = denied }, []string{"forwarding"}},
		"sockets":     {func(f *preflight.Facts) { f.Sockets.Err = denied }, []string{"UDP port"}},
		"links":       {func(f *preflight.Facts) { f.Links.Err = denied }, []string{"WireGuard", "MTU", "networks", "other CNIs"}},
		"routes":      {func(f *preflight.Facts) { f.Routes.Err = denied }, []string{"MTU", "networks"}},
		"no uplink":   {func(f *preflight.Facts) { f.Routes.Value = nil }, []string{"MTU"}},
		"ahead":       {func(f *preflight.Facts) { f.Ahead.Err = denied }, []string{"other CNIs"}},
		"programs":    {func(f *preflight.Facts) { f.Programs.Err = denied }, []string{"firewalls", "network managers"}},
		"networkd":    {func(f *preflight.Facts) { f.Networkd.Err = denied }, []string{"network managers"}},
		"NM":          {func(f *preflight.Facts) { f.NetworkManager.Err = denied }, []string{"network managers"}},
		"no ufw":      {func(f *preflight.Facts) { f.UFW.Err, f.Firewalld.Err = denied, denied }, nil}, // nobody asks it
		"ipvs":        {func(f *preflight.Facts) { f.IPVS.Err = denied }, []string{"kube-proxy"}},
		"directories": {func(f *preflight.Facts) { f.Directories.Err = denied }, []string{"directories"}},
		"admission":   {func(f *preflight.Facts) { f.Admission.Err = denied }, []string{"admission policies"}},
	} {
		f := healthy()
		c.change(&f)
		var not []string
		results := preflight.Check(f, wanted())
		for _, r := range results {
			if len(r.NotChecked) > 0 {
				not = append(not, r.Check)
			}
		}
		if !slices.Equal(not, c.want) {
			t.Errorf("%s: not checked are %q, want %q", name, not, c.want)
		}
		if found := findings(results); len(found) > 0 {
			t.Errorf("%s: findings %q", name, found)
		}
	}
	f, w := healthy(), wanted()
	w.ClusterCIDRs = nil
	f.Filter.Err = errors.Join(denied, errors.New("one\ntwo"), denied)
	for _, r := range preflight.Check(f, w) {
		if want := []string{"one; two", "permission denied"}; r.Check == "iptables backend" && !slices.Equal(r.NotChecked, want) {
			t.Errorf("joined reasons are %q, want %q", r.NotChecked, want)
		}
		if r.Check == "networks" && !strings.Contains(strings.Join(r.NotChecked, ""), "--cluster-cidr") {
			t.Errorf("without a cluster CIDR the networks are %+v", r)
		}
	}
}

// TestOrder puts the worst first.
func TestOrder(t *testing.T) {
	f := healthy()
	f.Ahead.Value = []preflight.Ahead{{Path: "00-multus.conf", Delegates: true}, {Path: "05-x.conf"}}
	addLink(&f, "cni0", "bridge")
	results := preflight.Check(f, wanted())
	want := []string{"error NetworkAhead 05-x.conf", "warning OtherCNILinks link cni0", "note NetworkAhead 00-multus.conf"}
	if diff := cmp.Diff(want, findings(results)); diff != "" {
		t.Error(diff)
	}
	for s, n := range map[preflight.Severity]int{preflight.Error: 1, preflight.Warning: 1, preflight.Note: 1} {
		if got := preflight.Count(results, s); got != n {
			t.Errorf("%s: %d, want %d", s, got, n)
		}
	}
}
