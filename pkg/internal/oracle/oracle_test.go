package oracle_test

import (
	"net/netip"
	"os/exec"
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/internal/oracle"
)

// An oracle that shares code with what it judges proves nothing.
func TestIndependence(t *testing.T) {
	out, err := exec.CommandContext(t.Context(), "go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatalf("listing dependencies: %v", err)
	}
	if !strings.Contains(string(out), "warren/pkg/cluster\n") {
		t.Fatalf("the list lacks pkg/cluster, so it shows nothing:\n%s", out)
	}
	for _, pkg := range []string{"warren/pkg/policy", "warren/pkg/netfilter", "warren/pkg/guard"} {
		if strings.Contains(string(out), pkg+"\n") {
			t.Errorf("the oracle depends on %s", pkg)
		}
	}
}

// The oracle is judged by cases whose answers can be read off the API's documentation.
func TestAllowed(t *testing.T) {
	web, db := netip.MustParseAddr("10.0.1.2"), netip.MustParseAddr("10.0.2.2")
	snapshot := func(policies ...cluster.Policy) cluster.Snapshot {
		return cluster.Snapshot{
			Self:       "here",
			Namespaces: []cluster.Namespace{{Name: "shop", Labels: labels.Set{"team": "a"}}},
			Pods: []cluster.Pod{
				{Namespace: "shop", Name: "db", Node: "there", Labels: labels.Set{"app": "db"}, Addresses: []netip.Addr{db}},
				{
					Namespace: "shop", Name: "web", Node: "here", Labels: labels.Set{"app": "web"}, Addresses: []netip.Addr{web},
					Ports: []cluster.NamedPort{{Name: "http", Protocol: cluster.TCP, Port: 8080}},
				},
			},
			Policies: policies,
		}
	}
	isolate := func(rules ...cluster.Rule) cluster.Policy {
		return cluster.Policy{Namespace: "shop", Name: "p", Pods: labels.Everything(), Ingress: true, IngressRules: rules}
	}
	db80 := cluster.Rule{
		Peers: []cluster.Peer{{Pods: labels.SelectorFromSet(labels.Set{"app": "db"})}},
		Ports: []cluster.Port{{Protocol: cluster.TCP, First: 80, Last: 90}},
	}
	for _, c := range []struct {
		name   string
		policy []cluster.Policy
		flow   oracle.Flow
		want   bool
	}{
		{"no policy", nil, oracle.Flow{Src: db, Dst: web, Protocol: cluster.TCP, Port: 80}, true},
		{"isolated", []cluster.Policy{isolate()}, oracle.Flow{Src: db, Dst: web, Protocol: cluster.TCP, Port: 80}, false},
		{"isolated for the other direction", []cluster.Policy{isolate()}, oracle.Flow{Src: web, Dst: db, Protocol: cluster.TCP, Port: 80}, true},
		{"itself", []cluster.Policy{isolate()}, oracle.Flow{Src: web, Dst: web, Protocol: cluster.TCP, Port: 80}, true},
		{"peer and port", []cluster.Policy{isolate(db80)}, oracle.Flow{Src: db, Dst: web, Protocol: cluster.TCP, Port: 90}, true},
		{"another port", []cluster.Policy{isolate(db80)}, oracle.Flow{Src: db, Dst: web, Protocol: cluster.TCP, Port: 91}, false},
		{"another protocol", []cluster.Policy{isolate(db80)}, oracle.Flow{Src: db, Dst: web, Protocol: cluster.UDP, Port: 80}, false},
		{"ICMP with ports", []cluster.Policy{isolate(db80)}, oracle.Flow{Src: db, Dst: web, Protocol: oracle.ICMP}, false},
		{"ICMP without ports", []cluster.Policy{isolate(cluster.Rule{AnyPeer: true, AnyPort: true})}, oracle.Flow{Src: db, Dst: web, Protocol: oracle.ICMP}, true},
		{"two policies add up", []cluster.Policy{isolate(), isolate(db80)}, oracle.Flow{Src: db, Dst: web, Protocol: cluster.TCP, Port: 80}, true},
		{
			"named port",
			[]cluster.Policy{isolate(cluster.Rule{AnyPeer: true, Ports: []cluster.Port{{Protocol: cluster.TCP, Name: "http"}}})},
			oracle.Flow{Src: db, Dst: web, Protocol: cluster.TCP, Port: 8080},
			true,
		},
		{
			"exception of a block",
			[]cluster.Policy{isolate(cluster.Rule{AnyPort: true, Peers: []cluster.Peer{{Block: &cluster.Block{
				CIDR: netip.MustParsePrefix("10.0.0.0/8"), Except: []netip.Prefix{netip.MustParsePrefix("10.0.2.0/24")},
			}}}})},
			oracle.Flow{Src: db, Dst: web, Protocol: cluster.TCP, Port: 80},
			false,
		},
	} {
		if got := oracle.Allowed(snapshot(c.policy...), c.flow); got != c.want {
			t.Errorf("%s: allowed is %v, want %v", c.name, got, c.want)
		}
	}
}
