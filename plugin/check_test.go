package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/podlink"
)

// corruption is one thing that is not as ADD left it.
type corruption struct {
	// pod and node are commands that make it, in the pod and on the node. $host is the name of the host end.
	pod, node string
	// do makes it where commands do not.
	do func(*node, *pod)
	// result changes the result that the runtime kept.
	result func(string) string
	code   uint
	want   string
}

// corruptions are of the link on both ends, of what else belongs to an attachment, and of the daemon.
func corruptions() map[string]corruption {
	return map[string]corruption{
		"pod's IPv4 address":             {pod: "ip addr del 10.244.1.2/32 dev eth0", want: "device eth0: address 10.244.1.2/32 is missing"},
		"pod's IPv6 address":             {pod: "ip addr del fd00:10:244:1::2/128 dev eth0", want: "device eth0: address fd00:10:244:1::2/128 is missing"},
		"pod's IPv4 route":               {pod: "ip route del default", want: "device eth0: route 0.0.0.0/0 is missing"},
		"pod's IPv6 route":               {pod: "ip -6 route del default", want: "device eth0: route ::/0 is missing"},
		"pod's IPv4 route, another way":  {pod: "ip route replace default via 169.254.1.2 dev eth0 onlink", want: "device eth0: route 0.0.0.0/0 is missing"},
		"pod's IPv6 route, another way":  {pod: "ip -6 route del default; ip -6 route add default via fe80::2 dev eth0 onlink", want: "device eth0: route ::/0 is missing"},
		"pod's IPv4 neighbour":           {pod: "ip neigh del 169.254.1.1 dev eth0", want: "device eth0: permanent neighbour 169.254.1.1 (ee:ee:ee:ee:ee:ee) is missing"},
		"pod's IPv6 neighbour":           {pod: "ip neigh del fe80::1 dev eth0", want: "device eth0: permanent neighbour fe80::1 (ee:ee:ee:ee:ee:ee) is missing"},
		"pod's IPv4 neighbour, its MAC":  {pod: "ip neigh replace 169.254.1.1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent", want: "device eth0: permanent neighbour 169.254.1.1"},
		"pod's IPv6 neighbour, its MAC":  {pod: "ip neigh replace fe80::1 lladdr 02:00:00:00:00:01 dev eth0 nud permanent", want: "device eth0: permanent neighbour fe80::1"},
		"pod's IPv4 neighbour, learnt":   {pod: "ip neigh change 169.254.1.1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud reachable", want: "device eth0: permanent neighbour 169.254.1.1"},
		"pod's IPv6 neighbour, learnt":   {pod: "ip neigh change fe80::1 lladdr ee:ee:ee:ee:ee:ee dev eth0 nud reachable", want: "device eth0: permanent neighbour fe80::1"},
		"pod's MAC address":              {pod: "ip link set eth0 address 02:00:00:00:00:01", want: "device eth0: its MAC address is 02:00:00:00:00:01, not "},
		"pod's link is down":             {pod: "ip link set eth0 down", want: "device eth0: it is down"},
		"pod's MTU":                      {pod: "ip link set eth0 mtu 1300", want: "device eth0: its MTU is 1300, not 1440"},
		"pod's link has another name":    {pod: "ip link set eth0 down; ip link set eth0 name eth1", want: "device eth0: Link not found"},
		"pod's IPv6 is switched off":     {pod: "echo 1 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6", want: "device eth0: address fd00:10:244:1::2/128 is missing"},
		"node's IPv4 route":              {node: "ip route del 10.244.1.2", want: "device $host: route 10.244.1.2/32 is missing"},
		"node's IPv6 route":              {node: "ip -6 route del fd00:10:244:1::2", want: "device $host: route fd00:10:244:1::2/128 is missing"},
		"node's IPv4 route, another way": {node: "ip route replace 10.244.1.2 dev lo", want: "device $host: route 10.244.1.2/32 is missing"},
		"node's IPv6 route, another way": {node: "ip -6 route del fd00:10:244:1::2; ip -6 route add fd00:10:244:1::2 dev lo", want: "device $host: route fd00:10:244:1::2/128 is missing"},
		"node's IPv4 neighbour":          {node: "ip neigh del 10.244.1.2 dev $host", want: "device $host: permanent neighbour 10.244.1.2"},
		"node's IPv6 neighbour":          {node: "ip neigh del fd00:10:244:1::2 dev $host", want: "device $host: permanent neighbour fd00:10:244:1::2"},
		"node's IPv4 neighbour, its MAC": {node: "ip neigh replace 10.244.1.2 lladdr 02:00:00:00:00:01 dev $host nud permanent", want: "device $host: permanent neighbour 10.244.1.2"},
		"node's IPv6 neighbour, its MAC": {node: "ip neigh replace fd00:10:244:1::2 lladdr 02:00:00:00:00:01 dev $host nud permanent", want: "device $host: permanent neighbour fd00:10:244:1::2"},
		"node's MAC address":             {node: "ip link set $host address 02:00:00:00:00:01", want: "device $host: its MAC address is 02:00:00:00:00:01, not ee:ee:ee:ee:ee:ee"},
		"node's link is down":            {node: "ip link set $host down", want: "device $host: it is down"},
		"node's MTU":                     {node: "ip link set $host mtu 1300", want: "device $host: its MTU is 1300, not 1440"},
		"node's link has another name":   {node: "ip link set $host down; ip link set $host name other", want: "device $host: Link not found"},
		"the link is gone":               {node: "ip link del $host", want: "device $host: Link not found"},

		"no lease":         {node: "rm $run/ipam/c-web@eth0 $run/ipam/10.* $run/ipam/fd00*", want: "interface eth0 of container c-web has no lease"},
		"unreadable lease": {node: "for f in c-web@eth0 10.244.1.2 fd00:10:244:1::2; do rm $run/ipam/$f; echo > $run/ipam/$f; done", want: "interface eth0 of container c-web has no lease"},
		"lease of another": {do: func(n *node, p *pod) { n.mustExec(p, "DEL"); n.mustExec(p, "ADD") }, want: "prevResult has no address 10.244.1.3, which is leased to the interface"},
		"lease cut off":    {node: ": > $run/ipam/c-web@eth0", want: "reading lease $run/ipam/c-web@eth0: it is no lease"},
		"lease of others": {
			node: `cd $run/ipam; text=$(sed 's/"10.244.1.2"/"10.244.1.3"/' c-web@eth0); echo "$text" > c-web@eth0`,
			want: "lease c-web@eth0: it does not name its address 10.244.1.2",
		},
		"address's file":          {node: "rm $run/ipam/10.244.1.2", want: "lease c-web@eth0: its address 10.244.1.2 has no file $run/ipam/10.244.1.2"},
		"IPv6 address's file":     {node: "rm $run/ipam/fd00:10:244:1::2", want: "its address fd00:10:244:1::2 has no file"},
		"address's file, another": {node: "rm $run/ipam/10.244.1.2; echo > $run/ipam/10.244.1.2", want: "the file $run/ipam/10.244.1.2 of its address is another's"},
		"address's file, a copy":  {node: "cd $run/ipam; rm 10.244.1.2; cp c-web@eth0 10.244.1.2", want: "the file $run/ipam/10.244.1.2 of its address is another's"},
		"address of no lease":     {result: func(r string) string { return strings.ReplaceAll(r, "10.244.1.2/32", "10.244.1.9/32") }, want: "prevResult has no address 10.244.1.2"},
		"interface unknown":       {result: func(r string) string { return strings.ReplaceAll(r, `"name": "eth0"`, `"name": "eth7"`) }, want: "prevResult has no interface eth0"},

		"the daemon's answer": {
			do:   func(n *node, _ *pod) { n.daemon.answers(refuse(agentapi.OpCheck, 999, "10.244.1.2 may not pass")) },
			want: "the daemon of this node refuses: 10.244.1.2 may not pass",
		},
		"daemon away": {do: func(n *node, _ *pod) { n.stop() }, code: types.ErrTryAgainLater, want: "the daemon of this node does not answer"},
	}
}

// check runs CHECK with the result of the ADD, and returns its error.
func (n *node) check(p *pod, result string, change ...func(map[string]any)) error {
	n.t.Helper()
	out, stderr, err := n.exec(p, "CHECK", append(change, func(c map[string]any) { c["prevResult"] = json.RawMessage(result) })...)
	if err == nil && out+stderr == "" {
		return nil
	}
	refusal := &types.Error{}
	if jsonErr := json.Unmarshal([]byte(out), refusal); jsonErr != nil || stderr != "" {
		n.t.Fatalf("%v: not one CNI error on stdout: %q, %q", err, out, stderr)
	}
	return refusal
}

// TestCheckNamesEachCorruption: CHECK passes, and fails once one single thing is not as ADD left it, and names that.
func TestCheckNamesEachCorruption(t *testing.T) {
	for name, c := range corruptions() {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := n.newPod("web")
			result := n.mustExec(p, "ADD")
			if err := n.check(p, result); err != nil {
				t.Fatalf("before the corruption: %v", err)
			}
			words := strings.NewReplacer("$host", podlink.HostName("c-web", "eth0"), "$run", n.runDir)
			run(t, p, words.Replace(c.pod))
			run(t, n, words.Replace(c.node))
			if c.do != nil {
				c.do(n, p)
			}
			if c.result != nil {
				result = c.result(result)
			}
			code := c.code
			if code == 0 {
				code = types.ErrInternal
			}
			wantCode(t, n.check(p, result), code, words.Replace(c.want))
		})
	}
}

// TestCheckLetsOthersBe: what other plugins, the pod itself or an operator put beside what ADD made is none of CHECK's business, nor
// is an MTU that the node has for new pods now.
func TestCheckLetsOthersBe(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	result := n.mustExec(p, "ADD")
	host := podlink.HostName("c-web", "eth0")
	run(t, p, `ip link add net1 type veth peer name net2; ip link set net1 up; ip addr add 192.168.9.2/24 dev net1; ip addr add 10.9.9.9/32 dev eth0
		ip addr add fd99::9/128 dev eth0 nodad; ip route add 192.168.77.0/24 via 169.254.1.1 dev eth0 onlink; ip route add default via 169.254.1.1 dev eth0 onlink metric 500
		ip neigh add 169.254.1.7 lladdr 02:00:00:00:00:07 dev eth0; iptables -A OUTPUT -d 192.0.2.1 -j DROP; ip rule add from 10.9.9.9 lookup 77`)
	run(t, n, "ip route add 10.99.0.0/16 dev "+host+"; ip neigh add 10.244.1.99 lladdr 02:00:00:00:00:99 dev "+host+
		"; tc qdisc add dev "+host+" root tbf rate 10mbit burst 32k latency 50ms; iptables -t nat -A PREROUTING -p tcp --dport 8080 -j DNAT --to 10.244.1.2:80"+
		"; ip link set "+host+" alias web; ip link add other type veth peer name other2")
	others := strings.Replace(result, `"interfaces": [`, `"interfaces": [{"name":"ifb7","mac":"02:00:00:00:00:77","mtu":900},`, 1)
	if others == result {
		t.Fatalf("the result has no interfaces: %s", result)
	}
	others = strings.ReplaceAll(others, `"interface": 1`, `"interface": 2`)
	for what, kept := range map[string]string{"the plugin's": result, "the chain's": others} {
		if err := n.check(p, kept, func(c map[string]any) { c["mtu"] = 1280 }); err != nil {
			t.Errorf("with %s result: %v", what, err)
		}
	}
}

// TestCheckAsksTheDaemonAboutThePod: the daemon is told whose gate, chains and guards it has to look at.
func TestCheckAsksTheDaemonAboutThePod(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	result := n.mustExec(p, "ADD")
	if err := n.check(p, result); err != nil {
		t.Fatal(err)
	}
	last := n.daemon.requests[len(n.daemon.requests)-1]
	if asked, err := json.Marshal(last.Pod); last.Op != agentapi.OpCheck || err != nil ||
		string(asked) != `{"containerID":"c-web","interface":"eth0","namespace":"shop","name":"web","uid":"uid-web","addresses":["10.244.1.2","fd00:10:244:1::2"]}` {
		t.Errorf("the daemon was asked to %s %s, %v", last.Op, asked, err)
	}
}

// TestStatusOfDaemonThatHangs comes before a runtime asks again.
func TestStatusOfDaemonThatHangs(t *testing.T) {
	n := newNode(t)
	hung := make(chan struct{})
	n.daemon.answers(func(agentapi.Request) *agentapi.Error {
		<-hung
		return nil
	})
	began := time.Now() //nolint:forbidigo // how long it takes
	out, stderr, err := n.exec(&pod{}, "STATUS")
	took := time.Since(began)
	close(hung)
	refusal := &types.Error{}
	if jsonErr := json.Unmarshal([]byte(out), refusal); err == nil || jsonErr != nil || stderr != "" {
		t.Fatalf("%v: not one CNI error on stdout: %q, %q", err, out, stderr)
	}
	wantCode(t, refusal, types.ErrPluginNotAvailable, "the daemon of this node does not answer")
	if took > 5*time.Second {
		t.Errorf("it took %s", took)
	}
}

// endCoolDown has an address been released for as long as the machine is up.
func (n *node) endCoolDown(address string) {
	n.t.Helper()
	if err := os.Chtimes(filepath.Join(n.runDir, "ipam", ".cooling", address), time.Time{}, time.Unix(0, 1)); err != nil {
		n.t.Fatal(err)
	}
}

// TestStatus has a cause for each answer.
func TestStatus(t *testing.T) {
	small := func(c map[string]any) { c["ranges"] = []string{"10.244.1.0/30"} }
	wide := func(c map[string]any) { c["ranges"] = []string{"10.244.1.0/29"} }
	tests := map[string]struct {
		prepare func(*node)
		config  func(map[string]any)
		code    uint
		want    string
	}{
		"ready":       {},
		"not ready":   {prepare: func(n *node) { n.daemon.answers(refuse(agentapi.OpReady, 11, "no podCIDR")) }, code: 50, want: "no podCIDR"},
		"ipvs":        {prepare: func(n *node) { n.daemon.answers(refuse(agentapi.OpReady, 51, "kube-proxy runs in ipvs mode")) }, code: 51, want: "ipvs"},
		"limited":     {prepare: func(n *node) { n.daemon.limited = "MeshApplyFailed: no tunnel" }, code: 51, want: "MeshApplyFailed: no tunnel"},
		"daemon away": {prepare: func(n *node) { n.stop() }, code: 50, want: "does not answer"},
		"room":        {prepare: func(n *node) { n.mustExec(n.newPod("other"), "ADD", wide) }, config: wide},
		"pool full": {
			prepare: func(n *node) { n.mustExec(n.newPod("other"), "ADD", small) }, config: small,
			code: 50, want: "range 10.244.1.0/30 is exhausted: all 1 addresses are leased (1 of them to namespace shop)",
		},
		"pool full, and limited": {
			prepare: func(n *node) { n.daemon.limited = "no tunnel"; n.mustExec(n.newPod("other"), "ADD", small) }, config: small, code: 50, want: "exhausted",
		},
		// An ADD that needs the address succeeds within seconds: no reason to make the node NotReady.
		"the last address cools down": {prepare: func(n *node) {
			p := n.newPod("other")
			n.mustExec(p, "ADD", small)
			n.mustExec(p, "DEL", small)
		}, config: small},
		"the last address is not swept": {prepare: func(n *node) {
			p := n.newPod("other")
			n.mustExec(p, "ADD", small)
			n.mustExec(p, "DEL", small) // the stand-in for the daemon ends no connection
			n.endCoolDown("10.244.1.2")
			out, _, err := n.exec(n.newPod("next"), "ADD", small)
			if err == nil || !strings.Contains(out, "1 stay taken until the connections") || !strings.Contains(out, `"code": 11`) {
				n.t.Errorf("ADD: %v: %s", err, out)
			}
		}, config: small, code: 50, want: "range 10.244.1.0/30 is exhausted: 0 addresses are leased and 1 stay taken until the connections"},
		"the last address is swept": {prepare: func(n *node) {
			p := n.newPod("other")
			n.mustExec(p, "ADD", small)
			n.daemon.answers(refuse(agentapi.OpReleased, 11, "no")) // so that DEL does it
			n.mustExec(p, "DEL", small)
			n.endCoolDown("10.244.1.2")
		}, config: small},
		"range without address": {config: func(c map[string]any) { c["ranges"] = []string{"10.244.1.0/31"} }, code: 50, want: "has no address to lease"},
		"leases unreadable": {prepare: func(n *node) {
			path := filepath.Join(n.runDir, "ipam")
			run(n.t, n, "touch "+path)
			pin(n.t, path)
		}, code: 50, want: "lease directory"},
		"no configuration": {config: func(c map[string]any) { c["mtu"] = 0 }, code: 7, want: "mtu: 0"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			if tt.prepare != nil {
				tt.prepare(n)
			}
			change := tt.config
			if change == nil {
				change = func(map[string]any) {}
			}
			p := &pod{}
			out, stderr, err := n.exec(p, "STATUS", change)
			if tt.code == 0 {
				if err != nil || out+stderr != "" {
					t.Errorf("got %v: %s%s", err, out, stderr)
				}
				return
			}
			refusal := &types.Error{}
			if jsonErr := json.Unmarshal([]byte(out), refusal); err == nil || jsonErr != nil || stderr != "" {
				t.Fatalf("%v: not one CNI error on stdout: %q, %q", err, out, stderr)
			}
			wantCode(t, refusal, tt.code, tt.want)
		})
	}
}
