package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/podlink"
)

func TestPodsOfOneNodeReachEachOther(t *testing.T) {
	n := newNode(t)
	one, two := n.newPod("one"), n.newPod("two")
	before := n.state(one, two)
	n.mustAdd(one)
	n.mustAdd(two)
	run(t, one, "ping -c 1 -W 2 10.244.1.3; ping -c 1 -W 2 fd00:10:244:1::3")
	run(t, two, "ping -c 1 -W 2 10.244.1.2; ping -c 1 -W 2 fd00:10:244:1::2")
	for _, p := range []*pod{one, two, two} { // the last one twice
		if err := n.del(p); err != nil {
			t.Error(err)
		}
	}
	n.unchanged(before, one, two)
}

func TestResult(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	result := n.mustAdd(p)
	got, err := json.Marshal(result)
	if err != nil {
		t.Fatal(err)
	}
	mac := strings.TrimSpace(run(t, p, "ip -br link show eth0 | awk '{print $3}'"))
	want := fmt.Sprintf(`{"cniVersion":"1.1.0","interfaces":[{"name":%q,"mac":"ee:ee:ee:ee:ee:ee","mtu":1440},`+
		`{"name":"eth0","mac":%q,"mtu":1440,"sandbox":%q}],`+
		`"ips":[{"interface":1,"address":"10.244.1.2/32","gateway":"169.254.1.1"},{"interface":1,"address":"fd00:10:244:1::2/128","gateway":"fe80::1"}],`+
		`"routes":[{"dst":"0.0.0.0/0","gw":"169.254.1.1"},{"dst":"::/0","gw":"fe80::1"}]}`, podlink.HostName("c-web", "eth0"), mac, p.Path())
	if diff := cmp.Diff(canonical(t, want), canonical(t, string(got))); diff != "" {
		t.Errorf("result (-want +got):\n%s", diff)
	}
	// The daemon learns who the pod is.
	last := n.daemon.requests[len(n.daemon.requests)-1]
	wantPod := `{"containerID":"c-web","interface":"eth0","namespace":"shop","name":"web","uid":"uid-web","addresses":["10.244.1.2","fd00:10:244:1::2"]}`
	if gotPod, _ := json.Marshal(last.Pod); last.Op != agentapi.OpAttach || string(gotPod) != wantPod {
		t.Errorf("the daemon was asked to %s %s, want %s", last.Op, gotPod, wantPod)
	}
	if diff := cmp.Diff([]string{"10.244.1.2", "fd00:10:244:1::2"}, n.open()); diff != "" {
		t.Errorf("open (-want +got):\n%s", diff)
	}
}

// canonical parses JSON so that it compares by content.
func canonical(t *testing.T, text string) any {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	return v
}

func TestEveryVersion(t *testing.T) {
	for _, version := range []string{"0.4.0", "1.0.0", "1.1.0"} {
		t.Run(version, func(t *testing.T) {
			n := newNode(t)
			p := n.newPod("web")
			out, stderr, err := n.exec(p, "ADD", withVersion(version))
			if err != nil || stderr != "" {
				t.Fatalf("ADD: %v\n%s%s", err, out, stderr)
			}
			var result struct{ CNIVersion string }
			if err = json.Unmarshal([]byte(out), &result); err != nil || result.CNIVersion != version {
				t.Errorf("version %q, %v; want %s", result.CNIVersion, err, version)
			}
			added := json.RawMessage(out)
			withResult := func(c map[string]any) { c["prevResult"] = added }
			for _, command := range []string{"CHECK", "DEL"} {
				if out, stderr, err = n.exec(p, command, withVersion(version), withResult); err != nil || out != "" || stderr != "" {
					t.Errorf("%s: %v\n%s%s", command, err, out, stderr)
				}
			}
		})
	}
}

func withVersion(version string) func(map[string]any) {
	return func(c map[string]any) { c["cniVersion"] = version }
}

// exec runs the plugin by itself, without libcni, and returns what it writes.
func (n *node) exec(p *pod, command string, change ...func(map[string]any)) (stdout, stderr string, err error) {
	n.t.Helper()
	entry := map[string]any{
		"cniVersion": "1.1.0", "name": "warren", "type": "warren",
		"runDir": n.runDir, "ranges": []string{"10.244.1.0/24", "fd00:10:244:1::/64"}, "mtu": 1440,
	}
	for _, c := range change {
		c(entry)
	}
	stdin, err := json.Marshal(entry)
	if err != nil {
		n.t.Fatal(err)
	}
	var args []string
	for _, a := range p.rt.Args {
		args = append(args, a[0]+"="+a[1])
	}
	var out, errOut bytes.Buffer
	program := append(slices.Clone(n.under), filepath.Join(binaries, "warren"))
	cmd := exec.Command(program[0], program[1:]...)
	cmd.Env = []string{
		"CNI_COMMAND=" + command, "CNI_CONTAINERID=" + p.rt.ContainerID, "CNI_NETNS=" + p.rt.NetNS, "CNI_IFNAME=" + p.rt.IfName,
		"CNI_PATH=" + binaries, "CNI_ARGS=" + strings.Join(args, ";"),
	}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = bytes.NewReader(stdin), &out, &errOut
	err = cmd.Run()
	return out.String(), errOut.String(), err
}

func TestVersionCommand(t *testing.T) {
	n := newNode(t)
	out, _, err := n.exec(n.newPod("web"), "VERSION")
	if err != nil || !strings.Contains(out, `"supportedVersions":["0.4.0","1.0.0","1.1.0"]`) {
		t.Errorf("%v: %s", err, out)
	}
}

func TestPreviousResultIsPassedOn(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	out, _, err := n.exec(p, "ADD", func(c map[string]any) {
		c["prevResult"] = json.RawMessage(`{"cniVersion":"1.1.0","interfaces":[{"name":"net0","sandbox":"/x"}],` +
			`"ips":[{"interface":0,"address":"192.168.7.7/24"}],"routes":[{"dst":"192.168.0.0/16"}],"dns":{"nameservers":["192.168.7.1"]}}`)
	})
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	result := &current.Result{}
	if err = json.Unmarshal([]byte(out), result); err != nil {
		t.Fatal(err)
	}
	var seen []string
	for _, ip := range result.IPs {
		seen = append(seen, result.Interfaces[*ip.Interface].Name+" "+ip.Address.String())
	}
	want := []string{"net0 192.168.7.7/24", "eth0 10.244.1.2/32", "eth0 fd00:10:244:1::2/128"}
	if diff := cmp.Diff(want, seen); diff != "" {
		t.Errorf("addresses (-want +got):\n%s", diff)
	}
	if len(result.Interfaces) != 3 || len(result.Routes) != 3 || !slices.Equal(result.DNS.Nameservers, []string{"192.168.7.1"}) {
		t.Errorf("result %s", out)
	}
}

// TestChain runs the plugin as the daemon's conflist does, with the reference plugins after it.
func TestChain(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	before := n.state(p)
	list := map[string]any{}
	if err := json.Unmarshal(n.conflistJSON(), &list); err != nil {
		t.Fatal(err)
	}
	list["plugins"] = append(list["plugins"].([]any),
		map[string]any{"type": "portmap", "capabilities": map[string]bool{"portMappings": true}, "snat": true},
		map[string]any{"type": "bandwidth", "capabilities": map[string]bool{"bandwidth": true}})
	data, err := json.Marshal(list)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		t.Fatal(err)
	}
	p.rt.CapabilityArgs = map[string]any{"portMappings": []map[string]any{{"hostPort": 8080, "containerPort": 80, "protocol": "tcp"}}}
	result, err := n.add(chain, p)
	if err != nil {
		t.Fatal(err)
	}
	if len(result.IPs) != 2 || len(result.Interfaces) != 2 {
		t.Errorf("result %v", result)
	}
	if rules := run(t, n, "iptables-save -t nat"); !strings.Contains(rules, "10.244.1.2:80") {
		t.Errorf("portmap made no rule for the pod:\n%s", rules)
	}
	if err = n.cni.CheckNetworkList(t.Context(), chain, &p.rt); err != nil {
		t.Errorf("CHECK: %v", err)
	}
	if err = n.cni.DelNetworkList(t.Context(), chain, &p.rt); err != nil {
		t.Errorf("DEL: %v", err)
	}
	run(t, n, "iptables -t nat -F; iptables -t nat -X; ip6tables -t nat -F; ip6tables -t nat -X") // what portmap keeps
	n.unchanged(before, p)
}

func TestConcurrentAdds(t *testing.T) {
	n := newNode(t)
	const pods = 20
	var all []*pod
	for i := range pods {
		all = append(all, n.newPod(fmt.Sprintf("p%d", i)))
	}
	before := n.state()
	list := n.conflist()
	var mu sync.Mutex
	seen := map[string]bool{}
	n.atOnce(all, func(p *pod) error {
		result, err := n.add(list, p)
		if err != nil {
			return err
		}
		mu.Lock()
		defer mu.Unlock()
		for _, ip := range result.IPs {
			seen[ip.Address.String()] = true
		}
		return nil
	})
	if len(seen) != 2*pods || len(n.open()) != 2*pods {
		t.Errorf("%d addresses were leased and %d are open, want %d distinct ones", len(seen), len(n.open()), 2*pods)
	}
	run(t, all[0], "ping -c 1 -W 2 10.244.1.21; ping -c 1 -W 2 fd00:10:244:1::15")
	n.atOnce(all, n.del)
	n.unchanged(before)
}

func TestDelWithoutAnything(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	before := n.state(p)
	n.mustAdd(p)
	n.stop()
	// Without daemon, netns, CNI_ARGS and with a previous result that is none.
	p.rt.NetNS, p.rt.Args = "/none", nil
	out, stderr, err := n.exec(p, "DEL", func(c map[string]any) { c["prevResult"] = "garbage"; c["ranges"] = nil; c["mtu"] = 0 })
	if err != nil || out != "" || stderr != "" {
		t.Errorf("%v\n%s%s", err, out, stderr)
	}
	n.unchanged(before, p)
	// Without the gate either.
	run(t, n, "ipset destroy")
	for range 2 {
		if out, _, err = n.exec(p, "DEL"); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	}
}

// TestReleasedAddressCoolsDown: neither a DEL nor an ADD that failed gives an address to the next pod at once; the runtime is told
// to try again later.
func TestReleasedAddressCoolsDown(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	small := func(c map[string]any) { c["ranges"] = []string{"10.244.1.0/30"} }
	endCoolDown := func() { run(t, n, "rm "+n.runDir+"/ipam/.cooling/10.244.1.2") }
	refused := func() {
		t.Helper()
		before := n.state()
		_, err := n.add(n.conflist(small), n.newPod("next"))
		wantCode(t, err, types.ErrTryAgainLater, "0 addresses are leased and 1 cool down after their release, the first of them for another ")
		n.unchanged(before)
	}
	for range 2 {
		if _, err := n.add(n.conflist(small), p); err != nil {
			t.Fatal(err)
		}
		if err := n.del(p); err != nil {
			t.Fatal(err)
		}
		refused()
		endCoolDown()
	}
	n.daemon.answers(refuse(agentapi.OpAttach, types.ErrTryAgainLater, "not known"))
	_, err := n.add(n.conflist(small), p)
	wantCode(t, err, types.ErrTryAgainLater, "not known")
	refused()
}

func TestDelAfterNamespaceIsGone(t *testing.T) {
	n := newNode(t)
	before := n.state()
	p := n.newPod("web")
	n.mustAdd(p)
	// The kernel deletes the link with the namespace; the name of it goes last.
	p.rt.NetNS = ""
	if err := n.del(p); err != nil {
		t.Error(err)
	}
	n.unchanged(before)
}

func TestPluginIsFreeOfKubernetes(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	deps := strings.Fields(string(out))
	if !slices.Contains(deps, "github.com/warren-cni/warren/pkg/ipam") {
		t.Fatalf("these are not the plugin's dependencies: %v", deps)
	}
	for _, d := range deps {
		if strings.HasPrefix(d, "k8s.io/") || strings.HasPrefix(d, "sigs.k8s.io/") || d == "net/http" {
			t.Errorf("the plugin links %s", d)
		}
	}
}

// TestSingleIsEarly has Go tell in which order it initializes packages: single comes before those that make something.
func TestSingleIsEarly(t *testing.T) {
	cmd := exec.Command(filepath.Join(binaries, "warren"))
	cmd.Env = []string{"GODEBUG=inittrace=1", "CNI_COMMAND=VERSION"}
	var trace bytes.Buffer
	cmd.Stdin, cmd.Stderr = strings.NewReader(`{"cniVersion":"1.0.0"}`), &trace
	if err := cmd.Run(); err != nil {
		t.Fatalf("%v: %s", err, &trace)
	}
	before, after, found := strings.Cut(trace.String(), "init github.com/warren-cni/warren/plugin/single ")
	if !found || !strings.Contains(after, "init syscall ") {
		t.Fatalf("these are not the plugin's packages: %s", &trace)
	}
	for line := range strings.Lines(before) {
		if !strings.HasSuffix(line, " 0 bytes, 0 allocs\n") {
			t.Errorf("before it something is made: %s", line)
		}
	}
}

// TestCnitool drives the plugin with the CNI project's own tool.
func TestCnitool(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	before := n.state(p)
	conf, lib := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(conf, "10-warren.conflist"), n.conflistJSON(), 0o600); err != nil {
		t.Fatal(err)
	}
	tool := func(command string) (string, error) {
		// cnitool keeps results below /var/lib/cni: give it a /var/lib of its own.
		cmd := exec.CommandContext(context.Background(), "unshare", "-m", "sh", "-ec",
			`mount --bind "$LIB" /var/lib; exec "$CNI_PATH/cnitool" "$0" warren "$NETNS"`, command)
		cmd.Env = append(os.Environ(), "LIB="+lib, "NETCONFPATH="+conf, "CNI_PATH="+binaries, "NETNS="+p.Path(),
			"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=u1")
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	for _, command := range []string{"status", "add", "check", "gc", "add", "del", "del", "status"} {
		out, err := tool(command)
		if err != nil {
			t.Fatalf("cnitool %s: %v\n%s", command, err, out)
		}
		if command == "add" {
			if !strings.Contains(out, "10.244.1.") {
				t.Errorf("cnitool add: %s", out)
			}
			run(t, n, "ip addr replace 10.244.1.1/32 dev lo; ping -c 1 -W 2 $(ip netns exec "+filepath.Base(p.Path())+" ip -4 -o addr show dev eth0 | awk '{print $4}' | cut -d/ -f1); ip addr del 10.244.1.1/32 dev lo")
		}
	}
	n.unchanged(before, p)
}
