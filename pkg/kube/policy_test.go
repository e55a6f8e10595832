package kube

import (
	"fmt"
	"net/netip"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/warren-cni/warren/pkg/cluster"
)

// policyCase is a policy's spec in YAML and what becomes of it.
type policyCase struct {
	spec   string
	want   cluster.Policy
	fields []string // of the problems, in order
}

func (c policyCase) run(t *testing.T) {
	t.Helper()
	policy := &networkingv1.NetworkPolicy{}
	policy.Namespace, policy.Name = "shop", "api"
	if err := yaml.UnmarshalStrict([]byte(c.spec), &policy.Spec); err != nil {
		t.Fatal(err)
	}
	got, problems := convertPolicy(policy)
	c.want.Namespace, c.want.Name = "shop", "api"
	if c.want.Pods == nil {
		c.want.Pods = selector(t, "")
	}
	checkEqual(t, "policy", c.want, got)
	checkEqual(t, "fields of the problems", c.fields, fieldsOf(problems))
	for _, p := range problems {
		if p.Code != "PolicyInvalid" || p.Object != "NetworkPolicy shop/api" || p.Message == "" || p.Remedy == "" {
			t.Errorf("problem %+v: want code, object, message and remedy", p)
		}
	}
}

func TestConvertPolicyDirections(t *testing.T) {
	anything := []cluster.Rule{{AnyPeer: true, AnyPort: true}}
	for name, c := range map[string]policyCase{
		"nothing isolates ingress":           {spec: `{podSelector: {}}`, want: cluster.Policy{Ingress: true}},
		"empty lists isolate ingress":        {spec: `{podSelector: {}, ingress: [], egress: []}`, want: cluster.Policy{Ingress: true}},
		"egress rules isolate both":          {spec: `{podSelector: {}, egress: [{}]}`, want: cluster.Policy{Ingress: true, Egress: true, EgressRules: anything}},
		"both types":                         {spec: `{podSelector: {}, policyTypes: [Ingress, Egress]}`, want: cluster.Policy{Ingress: true, Egress: true}},
		"egress only":                        {spec: `{podSelector: {}, policyTypes: [Egress]}`, want: cluster.Policy{Egress: true}},
		"rules of a type that is not listed": {spec: `{podSelector: {}, policyTypes: [Ingress], egress: [{}]}`, want: cluster.Policy{Ingress: true}},
		"ingress rules without their type":   {spec: `{podSelector: {}, policyTypes: [Egress], ingress: [{}]}`, want: cluster.Policy{Egress: true}},
		"an unknown type isolates both": {
			spec: `{podSelector: {}, policyTypes: [ingress], ingress: [{}]}`, fields: []string{"spec.policyTypes[0]"},
			want: cluster.Policy{Ingress: true, Egress: true, IngressRules: anything},
		},
	} {
		t.Run(name, c.run)
	}
}

func TestConvertPolicySelectors(t *testing.T) {
	for name, c := range map[string]policyCase{
		"labels and all operators": {
			spec: `{podSelector: {matchLabels: {app: api}, matchExpressions: [
			  {key: a, operator: In, values: [x, z]}, {key: b, operator: NotIn, values: [x]}, {key: c, operator: Exists}, {key: d, operator: DoesNotExist}]}}`,
			want: cluster.Policy{Ingress: true, Pods: selector(t, "a in (x,z),app=api,b notin (x),c,!d")},
		},
		"a bad podSelector isolates the namespace and allows nothing": {
			spec: `{podSelector: {matchExpressions: [{key: a, operator: Like, values: [x]}]}, ingress: [{}]}`,
			want: cluster.Policy{Ingress: true, IngressRules: []cluster.Rule{{}}}, fields: []string{"spec.podSelector"},
		},
		"In without values": {
			spec: `{podSelector: {matchExpressions: [{key: a, operator: In}]}, policyTypes: [Egress]}`,
			want: cluster.Policy{Egress: true}, fields: []string{"spec.podSelector"},
		},
		"a value that no label can have": {
			spec: `{podSelector: {matchLabels: {a: "-"}}}`,
			want: cluster.Policy{Ingress: true}, fields: []string{"spec.podSelector"},
		},
	} {
		t.Run(name, c.run)
	}
}

func TestConvertPolicyPeers(t *testing.T) {
	for name, test := range map[string]struct {
		from   string
		want   []cluster.Peer
		fields []string
	}{
		"pods of the own namespace":  {from: `[{podSelector: {matchLabels: {app: web}}}]`, want: []cluster.Peer{{Pods: selector(t, "app=web")}}},
		"all pods of the namespace":  {from: `[{podSelector: {}}]`, want: []cluster.Peer{{Pods: selector(t, "")}}},
		"all pods of all namespaces": {from: `[{namespaceSelector: {}}]`, want: []cluster.Peer{{Namespaces: selector(t, ""), Pods: selector(t, "")}}},
		"both selectors together": {
			from: `[{namespaceSelector: {matchLabels: {team: a}}, podSelector: {matchLabels: {app: web}}}]`,
			want: []cluster.Peer{{Namespaces: selector(t, "team=a"), Pods: selector(t, "app=web")}},
		},
		"either selector": {
			from: `[{namespaceSelector: {matchLabels: {team: a}}}, {podSelector: {matchLabels: {app: web}}}]`,
			want: []cluster.Peer{{Namespaces: selector(t, "team=a"), Pods: selector(t, "")}, {Pods: selector(t, "app=web")}},
		},
		"a block with exceptions": {
			from: `[{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, 10.2.0.9/24]}}]`,
			want: []cluster.Peer{{Block: &cluster.Block{CIDR: prefix("10.0.0.0/8"), Except: []netip.Prefix{prefix("10.1.0.0/16"), prefix("10.2.0.0/24")}}}},
		},
		"host bits":       {from: `[{ipBlock: {cidr: 10.1.2.3/8}}]`, want: []cluster.Peer{{Block: &cluster.Block{CIDR: prefix("10.0.0.0/8")}}}},
		"everything":      {from: `[{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: "::/0"}}]`, want: []cluster.Peer{{Block: &cluster.Block{CIDR: prefix("0.0.0.0/0")}}, {Block: &cluster.Block{CIDR: prefix("::/0")}}}},
		"an empty peer":   {from: `[{}]`, fields: []string{"from[0]"}},
		"block and pods":  {from: `[{ipBlock: {cidr: 10.0.0.0/8}, podSelector: {}}]`, fields: []string{"from[0]"}},
		"bad cidr":        {from: `[{ipBlock: {cidr: 10.0.0.0}}, {podSelector: {}}]`, fields: []string{"from[0].ipBlock.cidr"}, want: []cluster.Peer{{Pods: selector(t, "")}}},
		"empty cidr":      {from: `[{ipBlock: {cidr: ""}}]`, fields: []string{"from[0].ipBlock.cidr"}},
		"leading zeros":   {from: `[{ipBlock: {cidr: 010.0.0.0/8}}]`, fields: []string{"from[0].ipBlock.cidr"}},
		"IPv4 in IPv6":    {from: `[{ipBlock: {cidr: "::ffff:10.0.0.0/104"}}]`, fields: []string{"from[0].ipBlock.cidr"}},
		"bad exception":   {from: `[{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16, junk]}}]`, fields: []string{"from[0].ipBlock.except[1]"}},
		"foreign except":  {from: `[{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/16]}}]`, fields: []string{"from[0].ipBlock.except[0]"}},
		"wider exception": {from: `[{ipBlock: {cidr: 10.1.0.0/16, except: [10.0.0.0/8]}}]`, fields: []string{"from[0].ipBlock.except[0]"}},
		"except it all":   {from: `[{ipBlock: {cidr: 10.1.0.0/16, except: [10.1.0.0/16]}}]`, fields: []string{"from[0].ipBlock.except[0]"}},
		"other family":    {from: `[{ipBlock: {cidr: 10.0.0.0/8, except: ["fd00::/64"]}}]`, fields: []string{"from[0].ipBlock.except[0]"}},
		"bad namespaces": {
			from:   `[{namespaceSelector: {matchExpressions: [{key: a, operator: Like}]}, podSelector: {}}]`,
			fields: []string{"from[0].namespaceSelector"},
		},
		"bad pods": {from: `[{namespaceSelector: {}, podSelector: {matchLabels: {"a b": c}}}]`, fields: []string{"from[0].podSelector"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := policyCase{spec: "{podSelector: {}, ingress: [{from: " + test.from + "}]}", want: cluster.Policy{Ingress: true}}
			c.want.IngressRules = []cluster.Rule{{AnyPort: true, Peers: test.want}}
			for _, f := range test.fields {
				c.fields = append(c.fields, "spec.ingress[0]."+f)
			}
			c.run(t)
		})
	}
}

func TestConvertPolicyPorts(t *testing.T) {
	tcp := func(first, last uint16) cluster.Port {
		return cluster.Port{Protocol: cluster.TCP, First: first, Last: last}
	}
	for name, test := range map[string]struct {
		ports  string
		want   []cluster.Port
		fields []string
	}{
		"TCP by default":       {ports: `[{port: 80}]`, want: []cluster.Port{tcp(80, 80)}},
		"a protocol":           {ports: `[{protocol: UDP}, {protocol: SCTP, port: 7}]`, want: []cluster.Port{{Protocol: cluster.UDP}, {Protocol: cluster.SCTP, First: 7, Last: 7}}},
		"no protocol, no port": {ports: `[{}]`, want: []cluster.Port{{Protocol: cluster.TCP}}},
		"a range":              {ports: `[{port: 80, endPort: 90}, {port: 5, endPort: 5}]`, want: []cluster.Port{tcp(80, 90), tcp(5, 5)}},
		"a name":               {ports: `[{port: http}]`, want: []cluster.Port{{Protocol: cluster.TCP, Name: "http"}}},
		"a number as text":     {ports: `[{port: "80"}]`, fields: []string{"ports[0].port"}},
		"an empty name":        {ports: `[{port: ""}]`, fields: []string{"ports[0].port"}},
		"a long name":          {ports: `[{port: abcdefghijklmnop}]`, fields: []string{"ports[0].port"}},
		"port 0":               {ports: `[{port: 0}, {port: 1}]`, fields: []string{"ports[0].port"}, want: []cluster.Port{tcp(1, 1)}},
		"port 65536":           {ports: `[{port: 65536}]`, fields: []string{"ports[0].port"}},
		"a negative port":      {ports: `[{port: -1}]`, fields: []string{"ports[0].port"}},
		"a range backwards":    {ports: `[{port: 90, endPort: 80}]`, fields: []string{"ports[0].endPort"}},
		"a range too long":     {ports: `[{port: 90, endPort: 65536}]`, fields: []string{"ports[0].endPort"}},
		"a range from a name":  {ports: `[{port: http, endPort: 80}]`, fields: []string{"ports[0].endPort"}},
		"a range from nothing": {ports: `[{endPort: 80}]`, fields: []string{"ports[0].endPort"}},
		"unknown protocol":     {ports: `[{protocol: ICMP}]`, fields: []string{"ports[0].protocol"}},
		"lower case":           {ports: `[{protocol: tcp, port: 80}]`, fields: []string{"ports[0].protocol"}},
	} {
		t.Run(name, func(t *testing.T) {
			c := policyCase{spec: "{podSelector: {}, policyTypes: [Egress], egress: [{ports: " + test.ports + "}]}", want: cluster.Policy{Egress: true}}
			c.want.EgressRules = []cluster.Rule{{AnyPeer: true, Ports: test.want}}
			for _, f := range test.fields {
				c.fields = append(c.fields, "spec.egress[0]."+f)
			}
			c.run(t)
		})
	}
}

// TestConvertPolicyNeverOpens checks that a rule whose parts were all refused is not read as one without those parts.
func TestConvertPolicyNeverOpens(t *testing.T) {
	policyCase{
		spec: `{podSelector: {}, ingress: [
		  {from: [{}], ports: [{port: 80}]},
		  {from: [{podSelector: {}}], ports: [{port: 0}]},
		  {from: [], ports: []}]}`,
		want: cluster.Policy{Ingress: true, IngressRules: []cluster.Rule{
			{Ports: []cluster.Port{{Protocol: cluster.TCP, First: 80, Last: 80}}},
			{Index: 1, Peers: []cluster.Peer{{Pods: selector(t, "")}}},
			{Index: 2, AnyPeer: true, AnyPort: true},
		}},
		fields: []string{"spec.ingress[0].from[0]", "spec.ingress[1].ports[0].port"},
	}.run(t)
}

// The blocks of a policy share a bound, so that one object cannot fill the kernel's memory; those beyond it allow nothing.
func TestConvertPolicyBoundsBlocks(t *testing.T) {
	policy := &networkingv1.NetworkPolicy{}
	policy.Namespace, policy.Name = "shop", "api"
	hostile := networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "::/0"}}
	for i := range 1000 { // 128,001 prefixes
		hostile.IPBlock.Except = append(hostile.IPBlock.Except, fmt.Sprintf("2001:db8::%x/128", i))
	}
	harmless := networkingv1.NetworkPolicyPeer{IPBlock: &networkingv1.IPBlock{CIDR: "192.0.2.0/24", Except: []string{"192.0.2.7/32"}}}
	policy.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{
		{From: []networkingv1.NetworkPolicyPeer{hostile}}, {From: []networkingv1.NetworkPolicyPeer{hostile, harmless}},
	}
	got, problems := convertPolicy(policy)
	if len(got.IngressRules) != 2 || len(got.IngressRules[0].Peers) != 1 || len(got.IngressRules[1].Peers) != 1 || !got.IngressRules[1].Peers[0].Block.CIDR.Addr().Is4() {
		t.Errorf("the rules that are left: %+v", got.IngressRules)
	}
	checkEqual(t, "fields of the problems", []string{"spec.ingress[1].from[0].ipBlock"}, fieldsOf(problems))
}
