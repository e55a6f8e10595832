package kube

import (
	"net/netip"
	"testing"

	networkingv1 "k8s.io/api/networking/v1"
	"sigs.k8s.io/yaml"

	"github.com/warren-cni/warren/pkg/cluster"
)

// Whatever stands in a policy, it is converted without a panic into what isolates at least one direction, and into rules that
// cannot be read for more than they say.
func FuzzConvertPolicy(f *testing.F) {
	for _, seed := range []string{
		`{podSelector: {matchExpressions: [{key: a, operator: NotIn, values: [b]}]}, policyTypes: [Ingress, Egress, x]}`,
		`{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [10.1.0.0/16]}}], ports: [{port: 80, endPort: 90}]}]}`,
		`{podSelector: {}, egress: [{to: [{namespaceSelector: {}, podSelector: {matchLabels: {a: b}}}], ports: [{port: http, protocol: SCTP}]}]}`,
		`{podSelector: {}, ingress: [{from: [{}], ports: [{protocol: X}]}], egress: [{}]}`,
		`{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: "::ffff:10.0.0.0/104", except: ["::/0"]}}]}]}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, spec []byte) {
		policy := &networkingv1.NetworkPolicy{}
		policy.Namespace, policy.Name = "shop", "api"
		if err := yaml.Unmarshal(spec, &policy.Spec); err != nil {
			return
		}
		got, problems := convertPolicy(policy)
		if !got.Ingress && !got.Egress {
			t.Errorf("it isolates nothing: %s", spec)
		}
		checkFuzzedRules(t, policy.Spec.Ingress, got.IngressRules, func(r networkingv1.NetworkPolicyIngressRule) (int, int) { return len(r.From), len(r.Ports) })
		checkFuzzedRules(t, policy.Spec.Egress, got.EgressRules, func(r networkingv1.NetworkPolicyEgressRule) (int, int) { return len(r.To), len(r.Ports) })
		for _, p := range problems {
			if p.Code == "" || p.Message == "" || p.Remedy == "" {
				t.Errorf("a problem that does not say enough: %+v", p)
			}
		}
	})
}

// checkFuzzedRules holds the rules against those of the object: everybody and every port only where the object names none.
func checkFuzzedRules[R any](t *testing.T, object []R, rules []cluster.Rule, counts func(R) (peers, ports int)) {
	t.Helper()
	for _, r := range rules {
		peers, ports := counts(object[r.Index])
		if r.AnyPeer != (peers == 0) || r.AnyPort != (ports == 0) || len(r.Peers) > peers || len(r.Ports) > ports {
			t.Errorf("rule %d of %d peers and %d ports became %+v", r.Index, peers, ports, r)
		}
		for _, p := range r.Peers {
			inside := func(e netip.Prefix) bool { return e.Bits() > p.Block.CIDR.Bits() && p.Block.CIDR.Contains(e.Addr()) }
			switch {
			case p.Block == nil && p.Pods == nil:
				t.Errorf("rule %d has a peer that chooses nobody", r.Index)
			case p.Block != nil && p.Block.CIDR != p.Block.CIDR.Masked():
				t.Errorf("rule %d has a block that is not masked: %v", r.Index, p.Block.CIDR)
			}
			for i := 0; p.Block != nil && i < len(p.Block.Except); i++ {
				if !inside(p.Block.Except[i]) {
					t.Errorf("rule %d has the exception %v outside its block %v", r.Index, p.Block.Except[i], p.Block.CIDR)
				}
			}
		}
		for _, p := range r.Ports {
			if p.Name == "" && p.First > p.Last {
				t.Errorf("rule %d has the range %d to %d", r.Index, p.First, p.Last)
			}
		}
	}
}
