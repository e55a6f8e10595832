package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/preflight"
	"github.com/warren-cni/warren/pkg/testnode"
)

// patient is a node in a namespace, with directories, a first process and a configuration of its own.
type patient struct {
	reader

	t *testing.T
	// wireGuard is what the kernel says of itself, whatever that of this machine has.
	wireGuard bool
}

// newPatient moves the calling goroutine into a healthy node.
func newPatient(t *testing.T) *patient {
	t.Helper()
	testnode.Enter(t)
	root := t.TempDir()
	p := &patient{t: t, wireGuard: true, reader: newReader(doctorOptions{
		tunnelChoice: tunnelChoice{wireguard: "auto"},
		paths: paths{
			cniConfDir: filepath.Join(root, "cni-conf"), cniBinDir: filepath.Join(root, "cni-bin"),
			runDir: filepath.Join(root, "run", "warren"), stateDir: filepath.Join(root, "state"),
		},
		planning: planning{
			encryption: "on", logConnections: "none", port: 51820,
			clusterCIDRs: []string{"10.244.0.0/16", "fd00:10:244::/56"}, serviceCIDRs: []string{"10.96.0.0/12"},
		},
		sysctlDir: "/proc/sys",
	})}
	p.proc = filepath.Join(root, "proc")
	for _, dir := range []string{"cni-conf", "run", "proc/1/root/etc"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	p.file("1/comm", "systemd\n")
	p.file("misc", "229 fuse\n200 tun\n")
	p.mount(filepath.Join(root, "run"), 0)
	p.run("ip link add eth0 type veth peer name other")
	p.run("ip link set eth0 addrgenmode none")
	p.run("ip link set eth0 up")
	p.run("ip address add 192.0.2.1/24 dev eth0")
	p.run("ip address add 2001:db8::1/64 dev eth0 nodad")
	p.run("ip route add default dev eth0")
	p.run("ip -6 route add default dev eth0 proto static")
	return p
}

// run runs a program in the node.
func (p *patient) run(command string) {
	p.t.Helper()
	words := strings.Fields(command)
	if out, err := exec.CommandContext(p.t.Context(), words[0], words[1:]...).CombinedOutput(); err != nil {
		p.t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

// file writes a file below the node's /proc; its first process' root is there, too.
func (p *patient) file(name, text string) { p.write(filepath.Join(p.proc, name), text) }

func (p *patient) write(file, text string) {
	p.t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
		p.t.Fatal(err)
	}
}

// mount mounts a tmpfs on a directory for the time of the test.
func (p *patient) mount(dir string, flags uintptr) {
	p.t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		p.t.Fatal(err)
	}
	mountMemory(p.t, dir, flags, "")
}

// runs makes the node have a process of that name.
func (p *patient) runs(name string) { p.file("77/comm", name+"\n") }

// examine returns the findings in short, and fails the test for what was not checked, but for the API server that there is none of.
func (p *patient) examine() []string {
	p.t.Helper()
	if err := p.options.validate(); err != nil {
		p.t.Fatal(err)
	}
	facts := p.read(p.t.Context())
	facts.WireGuard = preflight.Reading[bool]{Value: p.wireGuard}
	return p.inShort(preflight.Check(facts, p.options.wanted()), "admission policies")
}

// inShort returns severity and code of each finding; only the named checks may be not done.
func (p *patient) inShort(results []preflight.Result, not ...string) []string {
	p.t.Helper()
	var found []string
	for _, r := range results {
		for _, f := range r.Findings {
			found = append(found, fmt.Sprintf("%s %s", f.Severity, f.Code))
			p.t.Logf("%s %s: %s: %s -> %s", f.Severity, f.Code, f.Object, f.Message, f.Remedy)
		}
		if len(r.NotChecked) > 0 && !slices.Contains(not, r.Check) {
			p.t.Errorf("%s was not checked: %q", r.Check, r.NotChecked)
		}
	}
	return found
}

// refuseRules puts programs ahead of iptables-restore that refuse rules with these words.
func (p *patient) refuseRules(words string) {
	p.t.Helper()
	tools := p.t.TempDir()
	for _, name := range []string{"iptables-nft-restore", "ip6tables-nft-restore"} {
		actual, err := exec.LookPath(name)
		if err != nil {
			p.t.Fatal(err)
		}
		script := fmt.Sprintf("#!/bin/sh\ninput=$(cat)\ncase \"$input\" in *%q*) echo 'Extension set revision 0 not supported, missing kernel module?' >&2; exit 4;; esac\nprintf '%%s\\n' \"$input\" | %s \"$@\"\n", words, actual)
		if err = os.WriteFile(filepath.Join(tools, name), []byte(script), 0o755); err != nil {
			p.t.Fatal(err)
		}
	}
	p.t.Setenv("PATH", tools+":"+os.Getenv("PATH"))
}

// What firewalls write when they are told to let Warren pass.
const (
	ufwDefaults = "IPV6=yes\nDEFAULT_INPUT_POLICY=\"DROP\"\nDEFAULT_FORWARD_POLICY=\"ACCEPT\"\n"
	ufwRules    = "*filter\n### RULES ###\n\n### tuple ### allow any any 0.0.0.0/0 any 10.244.0.0/16 in\n-A ufw-user-input -s 10.244.0.0/16 -j ACCEPT\n\n" +
		"### tuple ### allow udp 51820 0.0.0.0/0 any 0.0.0.0/0 in\n-A ufw-user-input -p udp --dport 51820 -j ACCEPT\n\n### END RULES ###\n"
	ufwRules6 = "*filter\n### RULES ###\n\n### tuple ### allow any any ::/0 any fd00:10:244::/56 in\n-A ufw6-user-input -s fd00:10:244::/56 -j ACCEPT\n"

	trustedZone = `<?xml version="1.0" encoding="utf-8"?>
<zone target="ACCEPT">
  <short>Trusted</short>
  <source address="10.244.0.0/16"/>
  <source address="fd00:10:244::/56"/>
</zone>
`
	portZone = `<?xml version="1.0" encoding="utf-8"?>
<zone>
  <service name="ssh"/>
  <port port="51820" protocol="udp"/>
</zone>
`
)

// sabotages are things done to a node, each with what the doctor must say, and nothing else.
var sabotages = map[string]struct {
	do   func(*patient)
	want []string
}{
	"kernel without WireGuard": {func(p *patient) { p.wireGuard = false }, []string{"warning NoWireGuard"}},
	"kernel without WireGuard and TUN": {func(p *patient) {
		p.wireGuard, p.tun = false, filepath.Join(p.t.TempDir(), "tun")
		p.file("misc", "229 fuse\n")
		if err := unix.Mknod(p.tun, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 254))); err != nil { // nobody's number
			p.t.Fatal(err)
		}
	}, []string{"error NoWireGuard"}},
	"another link has the name":  {func(p *patient) { p.run("ip link add warren0 type bridge") }, []string{"error LinkTaken"}},
	"iptables without set match": {func(p *patient) { p.refuseRules("-m set") }, []string{"error PacketFilterLacks", "error PacketFilterLacks"}},
	"kernel without connection tracking over netlink": {func(p *patient) {
		p.connections = func(context.Context) error { return unix.EOPNOTSUPP }
	}, []string{"error PacketFilterLacks"}},
	"kernel without a packet log": {func(p *patient) { p.packetLog = func() error { return unix.EOPNOTSUPP } }, []string{"error PacketFilterLacks"}},
	"both backends of iptables": {func(p *patient) {
		p.run("iptables-nft -N DOCKER-USER")
		p.run("iptables-legacy -t nat -N KUBE-SERVICES")
	}, []string{"warning BackendsMixed"}},
	"IPv4 forwarding off": {func(p *patient) { p.run("sysctl -qw net.ipv4.ip_forward=0") }, []string{"note ForwardingOff"}},
	"IPv6 forwarding off": {func(p *patient) { p.run("sysctl -qw net.ipv6.conf.all.forwarding=0") }, []string{"note ForwardingOff"}},
	"advertised default route": {func(p *patient) {
		p.run("sysctl -qw net.ipv6.conf.eth0.accept_ra=1")
		p.run("ip -6 route add default dev eth0 proto ra metric 100")
	}, []string{"warning RouterAdvertisements"}},
	"port taken":             {func(p *patient) { p.listen(":51820") }, []string{"error PortTaken"}},
	"port taken in IPv4":     {func(p *patient) { p.listen("192.0.2.1:51820") }, []string{"error PortTaken"}},
	"small uplink":           {func(p *patient) { p.run("ip link set eth0 mtu 1300") }, []string{"error MTUTooSmall"}},
	"large --mtu":            {func(p *patient) { p.options.mtu = 1500 }, []string{"warning MTUTooLarge"}},
	"node among pods":        {func(p *patient) { p.run("ip address add 10.244.7.7/32 dev eth0") }, []string{"error NetworkHoldsNode"}},
	"node among pods, IPv6":  {func(p *patient) { p.run("ip address add fd00:10:244::7/128 dev eth0 nodad") }, []string{"error NetworkHoldsNode"}},
	"node among Services":    {func(p *patient) { p.run("ip address add 10.96.7.7/16 dev eth0") }, []string{"error NetworkHoldsNode"}},
	"route to pods' network": {func(p *patient) { p.run("ip route add 10.244.128.0/17 dev eth0") }, []string{"warning NetworkOverlapsRoute"}},
	"Services among pods":    {func(p *patient) { p.options.serviceCIDRs = []string{"10.244.0.0/20"} }, []string{"error NetworksOverlap"}},
	"another CNI's conflist": {func(p *patient) { p.conf("05-cilium.conflist", `{"plugins":[{"type":"cilium-cni"}]}`) }, []string{"error NetworkAhead"}},
	"a broken configuration": {func(p *patient) { p.conf("00-x.conf", `{`) }, []string{"error NetworkAhead"}},
	"a delegating conflist": {func(p *patient) {
		p.conf("00-multus.conf", `{"capabilities":{"portMappings":true},"cniVersion":"0.3.1","name":"multus-cni-network","clusterNetwork":"/host/etc/cni/net.d/10-warren.conflist","type":"multus-shim"}`)
	}, []string{"note NetworkAhead"}},
	"a bridge CNI's link": {func(p *patient) {
		p.run("ip link add cni0 type bridge")
		p.run("ip address add 10.244.1.1/24 dev cni0")
	}, []string{"warning OtherCNILinks"}},
	"flannel's link":         {func(p *patient) { p.run("ip link add flannel.1 type vxlan id 1 dstport 8472 dev eth0") }, []string{"warning OtherCNILinks"}},
	"Calico's links":         {func(p *patient) { p.run("ip link add cali0123456789a type veth peer name cali0123456789b") }, []string{"warning OtherCNILinks"}},
	"Cilium's links":         {func(p *patient) { p.run("ip link add cilium_host type veth peer name cilium_net") }, []string{"warning OtherCNILinks"}},
	"Calico's rules":         {func(p *patient) { p.run("iptables-nft -N cali-FORWARD") }, []string{"warning OtherCNIRules"}},
	"Cilium's rules, legacy": {func(p *patient) { p.run("iptables-legacy -t mangle -N CILIUM_PRE_mangle") }, []string{"warning OtherCNIRules"}},
	"flannel's rules":        {func(p *patient) { p.run("iptables-nft -t nat -N FLANNEL-POSTRTG") }, []string{"warning OtherCNIRules"}},
	"kube-router's rules":    {func(p *patient) { p.run("ip6tables-nft -N KUBE-ROUTER-FORWARD") }, []string{"warning OtherCNIRules"}},
	"ufw":                    {func(p *patient) { p.run("iptables-nft -N ufw-user-input") }, []string{"warning UFW"}},
	"firewalld":              {func(p *patient) { p.runs("firewalld") }, []string{"warning Firewalld"}},
	"ufw, told half": {func(p *patient) {
		p.run("iptables-nft -N ufw-user-input")
		p.file("1/root/etc/default/ufw", ufwDefaults)
		p.file("1/root/etc/ufw/user.rules", ufwRules)
	}, []string{"warning UFW"}},
	"firewalld, told half": {func(p *patient) {
		p.runs("firewalld")
		p.file("1/root/etc/firewalld/firewalld.conf", "DefaultZone=home\n")
		p.file("1/root/etc/firewalld/zones/trusted.xml", trustedZone)
		p.file("1/root/etc/firewalld/zones/public.xml", portZone)
	}, []string{"warning Firewalld"}},
	"networkd": {func(p *patient) { p.runs("systemd-network") }, []string{"warning NetworkdManagesRoutes"}},
	"networkd, main file": {func(p *patient) {
		p.runs("systemd-network")
		p.file("1/root/usr/lib/systemd/networkd.conf", "[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n")
		p.file("1/root/etc/systemd/networkd.conf", "[Network]\n#ManageForeignRoutes=no\n") // which takes the place of the other
	}, []string{"warning NetworkdManagesRoutes"}},
	"NetworkManager": {func(p *patient) {
		p.runs("NetworkManager")
		p.file("1/root/etc/NetworkManager/NetworkManager.conf", "[main]\nplugins=ifupdown,keyfile\n")
	}, []string{"warning NetworkManagerManagesLinks"}},
	"NetworkManager, shadowed": {func(p *patient) {
		p.runs("NetworkManager")
		p.file("1/root/usr/lib/NetworkManager/conf.d/w.conf", "[keyfile]\nunmanaged-devices=interface-name:wrn*;interface-name:warren0\n")
		p.file("1/root/etc/NetworkManager/conf.d/w.conf", "")
	}, []string{"warning NetworkManagerManagesLinks"}},
	"kube-proxy in ipvs mode": {func(p *patient) { p.run("ip link add kube-ipvs0 type bridge") }, []string{"error KubeProxyIPVS"}},
	"plugins read-only":       {func(p *patient) { p.mount(p.options.cniBinDir, unix.MS_RDONLY) }, []string{"error DirectoryNotWritable"}},
	"plugins not to be run":   {func(p *patient) { p.mount(p.options.cniBinDir, unix.MS_NOEXEC) }, []string{"error DirectoryNoExec"}},
	"configuration read-only": {func(p *patient) { p.mount(p.options.cniConfDir, unix.MS_RDONLY) }, []string{"error DirectoryNotWritable"}},
	"state is a file":         {func(p *patient) { p.write(p.options.stateDir, "") }, []string{"error DirectoryNotWritable"}},
	"run directory on a disk": {func(p *patient) { p.options.runDir = p.options.cniConfDir }, []string{"warning RunDirOutlivesBoot"}},
}

func (p *patient) listen(address string) {
	p.t.Helper()
	socket, err := (&net.ListenConfig{}).ListenPacket(p.t.Context(), "udp", address)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = socket.Close() })
}

func (p *patient) conf(name, text string) { p.write(filepath.Join(p.options.cniConfDir, name), text) }

// TestDoctorSabotaged spoils a healthy node in one way at a time.
func TestDoctorSabotaged(t *testing.T) {
	for name, c := range sabotages {
		t.Run(name, func(t *testing.T) {
			p := newPatient(t)
			c.do(p)
			if diff := cmp.Diff(c.want, p.examine()); diff != "" {
				t.Errorf("the findings differ (-want +got):\n%s", diff)
			}
		})
	}
}

// TestDoctorHealthy gives a node what is no fault.
func TestDoctorHealthy(t *testing.T) {
	for name, do := range map[string]func(*patient){
		"nothing yet": func(*patient) {},
		"a node of kind": func(p *patient) {
			p.run("iptables-nft -t mangle -N KUBE-IPTABLES-HINT")
			p.run("iptables-nft -t nat -N KUBE-SERVICES")
			p.run("iptables-nft -t nat -N DOCKER_OUTPUT")
			p.run("iptables-nft -t nat -N CNI-HOSTPORT-DNAT")
			p.conf("10-warren.conflist", `{"plugins":[{"type":"warren"}]}`)
			p.conf("87-podman-bridge.conflist", `{"plugins":[{"type":"bridge"}]}`)
			p.conf("00-readme.txt", "")
		},
		"Docker, with its own network": func(p *patient) {
			p.run("iptables-nft -N DOCKER-USER")
			p.run("iptables-nft -P FORWARD DROP")
			p.run("ip link add docker0 type bridge")
			p.run("ip address add 172.17.0.1/16 dev docker0")
			p.listen(":4789")
		},
		"networkd told to leave others alone": func(p *patient) {
			p.runs("systemd-network")
			p.file("1/root/etc/systemd/networkd.conf", "[Network]\n#ManageForeignRoutes=yes\n")
			p.file("1/root/etc/systemd/networkd.conf.d/90-warren.conf", "[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n")
			p.file("1/root/usr/lib/systemd/networkd.conf.d/10-x.conf", "[Network]\nManageForeignRoutes=yes\n")
		},
		"NetworkManager told to leave Warren alone": func(p *patient) {
			p.runs("NetworkManager")
			p.file("1/root/usr/lib/NetworkManager/conf.d/x.conf", "[keyfile]\nunmanaged-devices=none\n")
			p.file("1/root/etc/NetworkManager/conf.d/90-warren.conf", "[keyfile]\nunmanaged-devices+=interface-name:wrn*;interface-name:warren0\n")
		},
		"ufw told to let Warren pass": func(p *patient) {
			p.run("iptables-nft -N ufw-user-input")
			p.file("1/root/etc/default/ufw", ufwDefaults)
			p.file("1/root/etc/ufw/user.rules", ufwRules)
			p.file("1/root/etc/ufw/user6.rules", ufwRules6)
		},
		"firewalld told to let Warren pass": func(p *patient) {
			p.runs("firewalld")
			p.file("1/root/etc/firewalld/firewalld.conf", "# comment\nDefaultZone=home\n")
			p.file("1/root/etc/firewalld/zones/trusted.xml", trustedZone)
			p.file("1/root/etc/firewalld/zones/home.xml", portZone)
		},
		"networkd keeps the advertised route": func(p *patient) {
			p.run("sysctl -qw net.ipv6.conf.eth0.accept_ra=0")
			p.run("ip -6 route add default dev eth0 proto ra metric 100")
		},
		"encryption off, small MTU": func(p *patient) {
			p.options.encryption, p.wireGuard = "off", false
			p.run("ip link set eth0 mtu 1280")
			p.listen(":51820")
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPatient(t)
			do(p)
			if found := p.examine(); len(found) > 0 {
				t.Errorf("the findings are %q, want none", found)
			}
		})
	}
}

// TestDoctorAdmission asks an API server that has no admission policies, and one that is not there.
func TestDoctorAdmission(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	text := "apiVersion: v1\nkind: Config\nclusters: [{name: c, cluster: {server: " + server.URL + "}}]\ncontexts: [{name: c, context: {cluster: c}}]\ncurrent-context: c\n"
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	r := reader{options: doctorOptions{kubeconfig: kubeconfig}}
	found, err := r.admission(t.Context())
	if err != nil || len(found) != 3 || found[0].Code != "AdmissionPolicyMissing" {
		t.Errorf("without policies: %v, %v", found, err)
	}
	server.Close()
	if found, err = r.admission(t.Context()); err == nil || len(found) > 0 {
		t.Errorf("without a server: %v, %v", found, err)
	}
	r.options.kubeconfig = ""
	if _, err = r.admission(t.Context()); err == nil || !strings.Contains(err.Error(), "--kubeconfig") {
		t.Errorf("without a name of one: %v", err)
	}
}

// snapshotOf is what the doctor must leave alone on a node.
const snapshotOf = `ip -oneline address; ip -oneline link | sed 's/ state [A-Z]* / /'; ip route show table all; ip -6 route show table all | sed 's/ expires [0-9a-z]*//'
ip rule; iptables-save | grep -v '^[#:]' | sed 's/^\[[0-9:]*\] //'; ip6tables-save | grep -v '^[#:]'; ipset list -name; sysctl -a 2>/dev/null | grep -E 'forwarding|accept_ra |ip_forward'
cat /proc/net/ip_tables_names /proc/net/ip6_tables_names 2>/dev/null || true`

// TestDoctorOnRunningNode finds no fault in a node on which Warren runs with pods: not in its rules, links, socket and port. It sees
// less in a container as that of the manifests, and says so. Nowhere does it change anything.
func TestDoctorOnRunningNode(t *testing.T) {
	dir := t.TempDir()
	mountMemory(t, dir, 0, "")
	s := runningOf(t, lab.Options{Name: "doctor", Nodes: 2, Dir: dir})
	s.reaches(s.pod(0, "one"), s.pod(1, "two"))
	node := s.Nodes[0]
	warrend := warrendIn(t)
	doctor := []string{
		warrend, doctorName, "-o", "json", "--cluster-cidr", "10.244.0.0/16,fd00:10:244::/48", "--service-cidr", "10.96.0.0/12",
		"--run-dir", filepath.Dir(node.Leases()), "--state-dir", node.StateDir(), "--cni-conf-dir", filepath.Dir(node.Conflist()), "--cni-bin-dir", filepath.Dir(warrend),
	}
	container := confined(containerOf(t, shipped(t), "warrend").SecurityContext.Capabilities.Add)
	for name, c := range map[string]struct{ prefix, not []string }{
		"as root on the node":               {nil, []string{"admission policies"}},
		"in the container of the manifests": {container, []string{"packet filter", "firewalls", "network managers", "directories", "admission policies"}},
	} {
		t.Run(name, func(t *testing.T) {
			before, err := node.Run(t.Context(), "sh", "-c", snapshotOf)
			if err != nil {
				t.Fatal(err)
			}
			out, err := node.Run(t.Context(), slices.Concat(c.prefix, doctor)...)
			if err != nil {
				t.Errorf("%v", err)
			}
			var results []preflight.Result
			if err = json.Unmarshal([]byte(out), &results); err != nil {
				t.Fatalf("%v in %q", err, out)
			}
			results = ofNode(results)
			if found := (&patient{t: t}).inShort(results, c.not...); len(found) > 0 {
				t.Errorf("the findings are %q, want none", found)
			}
			for _, r := range results {
				t.Logf("%s: %s %v", r.Check, inAWord(r), r.NotChecked)
				if slices.Contains(c.not, r.Check) && len(r.NotChecked) == 0 {
					t.Errorf("%s has been checked", r.Check)
				}
			}
			after, err := node.Run(t.Context(), "sh", "-c", snapshotOf)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(before, after); diff != "" || !strings.Contains(after, netfilter.Prefix) {
				t.Errorf("the doctor changed the node (-before +after):\n%s", diff)
			}
		})
	}
}

// ofNode leaves out what is of the machine that the lab's nodes are on.
func ofNode(results []preflight.Result) []preflight.Result {
	return slices.DeleteFunc(results, func(r preflight.Result) bool {
		return r.Check == "network managers" && len(r.NotChecked) == 0 || r.Check == "firewalls" && len(r.NotChecked) == 0
	})
}

// warrendIn returns the path of the daemon under test.
func warrendIn(t *testing.T) string {
	t.Helper()
	dir, err := programs.Dir(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(dir, "warrend")
}

// TestInstallAdvises installs on a node with faults, which it names, and fails for none of them; nor for flags that are wrong.
func TestInstallAdvises(t *testing.T) {
	warrend := warrendIn(t)
	p := newPatient(t)
	p.run("ip link add cni0 type bridge")
	p.options.runDir = t.TempDir() // on a disk
	source := t.TempDir()
	p.write(filepath.Join(source, "warren"), "plugin")
	for flag, want := range map[string][]string{
		"--encryption=off":   {"code=OtherCNILinks", "code=RunDirOutlivesBoot", "severity=warning", "installed"},
		"--encryption=maybe": {"not looking at the node", "say on or off", "installed"},
	} {
		args := []string{
			"install", "--source", source, "--cni-bin-dir", p.options.cniBinDir, "--cni-conf-dir", p.options.cniConfDir,
			"--run-dir", p.options.runDir, "--state-dir", p.options.stateDir, flag,
		}
		out, err := exec.CommandContext(t.Context(), warrend, args...).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v", flag, err)
		}
		for _, words := range want {
			if !strings.Contains(string(out), words) {
				t.Errorf("%s: the log does not say %q:\n%s", flag, words, out)
			}
		}
		if text, err := os.ReadFile(filepath.Join(p.options.cniBinDir, "warren")); err != nil || string(text) != "plugin" {
			t.Errorf("%s: the plugin is %q, %v", flag, text, err)
		}
	}
}

// TestDoctorOutput checks the table and the exit status.
func TestDoctorOutput(t *testing.T) {
	results := []preflight.Result{
		{Check: "kernel", Findings: []preflight.Finding{}},
		{Check: "UDP port", Findings: []preflight.Finding{{Severity: preflight.Error, Code: "PortTaken", Object: "UDP port 51820", Message: "it is", Remedy: "stop it"}}},
		{Check: "firewalls", NotChecked: []string{"permission denied"}},
	}
	var b strings.Builder
	if err := printResults(&b, results, "table"); err != nil {
		t.Fatal(err)
	}
	want := `CHECK       RESULT
kernel      ok
UDP port    error
firewalls   not checked

ERROR PortTaken: UDP port 51820
    it is
    -> stop it
NOT CHECKED: firewalls: permission denied
1 error(s), 0 warning(s), 0 note(s)
`
	if diff := cmp.Diff(want, b.String()); diff != "" {
		t.Errorf("the table differs (-want +got):\n%s", diff)
	}
}

// TestDoctorStatus runs the command on a node with an error, without one, and with a wrong flag.
func TestDoctorStatus(t *testing.T) {
	p := newPatient(t)
	args := []string{
		doctorName, "--encryption", "off", "--run-dir", p.options.runDir, "--state-dir", p.options.stateDir,
		"--cni-conf-dir", p.options.cniConfDir, "--cni-bin-dir", p.options.cniBinDir,
	}
	for _, c := range []struct {
		more []string
		want int
	}{{nil, 0}, {[]string{"--cluster-cidr", "10.244.0.0/16", "--service-cidr", "10.244.128.0/20"}, 1}, {[]string{"--encryption", "maybe"}, 2}, {[]string{"-o", "xml"}, 2}, {[]string{"--nosuch"}, 2}} {
		root := rootCommand()
		root.SetArgs(slices.Concat(args, c.more))
		root.SetOut(t.Output())
		root.SetErr(t.Output())
		if got := execute(t.Context(), root); got != c.want {
			t.Errorf("with %q the status is %d, want %d", c.more, got, c.want)
		}
	}
}
