package main

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

const (
	// enforcedWithin is how long a good policy may take among hostile ones, the reading of the directory included.
	enforcedWithin = 5 * time.Second
	// goodPods is how many pods the good policies select in turn.
	goodPods = 4
)

// hostile returns a policy's spec that is wrong, absurd or large in one of many ways.
func hostile(i int, random *rand.Rand) string {
	long := strings.Repeat("x", 10000)
	var blocks strings.Builder
	for range 3000 {
		fmt.Fprintf(&blocks, "{ipBlock: {cidr: %d.%d.%d.0/24, except: [%[1]d.%[2]d.%[3]d.128/25]}}, ", random.IntN(224), random.IntN(256), random.IntN(256))
	}
	specs := []string{
		`{podSelector: {matchExpressions: [{key: app, operator: Frobnicate, values: [a]}]}}`,
		`{podSelector: {}, ingress: [{ports: [{protocol: TCP, port: 65535, endPort: 1}]}]}`,
		`{podSelector: {}, ingress: [{ports: [{protocol: TCP, port: 70000, endPort: 2147483647}, {port: -1}, {port: 0}]}]}`,
		`{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{from: [` + blocks.String() + `]}], egress: [{to: [` + blocks.String() + `]}]}`,
		`{podSelector: {}, ingress: [{ports: [{protocol: QUIC, port: 443}]}]}`,
		`{podSelector: {matchLabels: {app: ` + long + `}}}`,
		`{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {` + long + `: a}}}]}]}`,
		`{podSelector: {}, ingress: [{ports: [{port: nobody-has-it}, {port: ` + long + `}, {port: "` + "\\u0000" + `"}]}]}`,
		`{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.300/8}}, {ipBlock: {cidr: "::ffff:10.0.0.0/104"}}, {ipBlock: {cidr: "fe80::1%eth0/64"}}]}]}`,
		`{podSelector: {}, ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8, except: [11.0.0.0/8]}}]}]}`,
		`{podSelector: {}, policyTypes: [Sideways]}`,
		`{podSelector: {}, ingress: [{from: [{podSelector: {}, ipBlock: {cidr: 10.0.0.0/8}}, {}]}]}`,
		`{podSelector: {matchExpressions: [{key: app, operator: In}, {key: app, operator: Exists, values: [a]}]}}`,
		`{podSelector: "all", ingress: everybody}`,
		`[]`,
		`{podSelector: {}, ingress: [{from: [{podSelector: {matchLabels: {app: "; iptables -F #"}}}]}]}`,
	}
	return specs[i%len(specs)]
}

// Among as many hostile policies the good ones are enforced in time, before and after; status names the hostile ones; the daemon
// lives; their namespace is isolated and nobody else's; and when they are gone nothing is left of them.
func TestProofHostilePolicies(t *testing.T) {
	t.Parallel()
	s := running(t, "wphostile", 1)
	random := soak.Random(t)
	s.write("namespace-hostile", corev1.Namespace{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: "hostile"},
	})
	client, friend, open := s.pod(0, "client"), s.pod(0, "friend"), s.pod(0, "open")
	var good []*lab.Pod
	for i := range goodPods {
		good = append(good, s.pod(0, fmt.Sprintf("good-%d", i)))
	}
	victim, err := s.Nodes[0].AddPod(t.Context(), lab.Pod{Namespace: "hostile", Name: "victim"})
	if err != nil {
		t.Fatal(err)
	}
	s.healthy(0)
	counters := map[string]*tagged.Counter{}
	for _, pod := range append(good, victim) {
		counters[pod.Name] = s.counter(pod.Netns())
	}
	fire := tagged.Fire{Tag: tagForbidden, Targets: addresses(append(good, victim)...), Port: port, Every: 20 * time.Millisecond}
	t.Cleanup(s.fire(client, fire).Cease)
	for _, counter := range counters {
		s.eventually(func() error { return inFamilies(counter, tagForbidden) })
	}
	empty := ourRules(t, s)

	count := soak.Trials(500)
	write := func(i int) {
		s.writeText(fmt.Sprintf("hostile-%d", i), fmt.Sprintf(
			"apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: hostile, name: hostile-%d}\nspec: %s\n", i, hostile(i, random)))
		pod := fmt.Sprintf("good-%d", i%goodPods)
		s.write(fmt.Sprintf("good-%d", i), rules{name: fmt.Sprintf("good-%d", i), selector: app(pod), from: app("friend")}.object())
	}
	for i := range count {
		write(i)
	}
	s.quietWithin(enforcedWithin, counters)
	for _, pod := range good {
		s.reaches(friend, pod)
	}
	s.reaches(client, open)
	// One more, when all of them stand.
	s.write("late", rules{name: "late", selector: app("open"), from: app("friend")}.object())
	late := map[string]*tagged.Counter{"open": s.counter(open.Netns())}
	t.Cleanup(s.fire(client, tagged.Fire{Tag: tagForbidden, Targets: open.Addresses, Port: port, Every: 20 * time.Millisecond}).Cease)
	s.quietWithin(enforcedWithin, late)

	status := s.status(0)
	named := 0
	for i := range count {
		for _, p := range status.Problems {
			if strings.HasSuffix(p.Object, fmt.Sprintf("hostile/hostile-%d", i)) || strings.Contains(p.Object, fmt.Sprintf("hostile-%d.yaml", i)) {
				named++
				break
			}
		}
	}
	if named < count*3/4 || named > count { // the rest is large and strange, but says what to do
		t.Errorf("status names %d of %d hostile policies", named, count)
	}
	for _, p := range status.Problems {
		if !strings.Contains(p.Object, "hostile") {
			t.Errorf("a problem of what is not hostile: %+v", p)
		}
	}
	if strings.Contains(s.daemons[0].Log(1000000), "panic") {
		t.Error("the daemon panicked")
	}
	for i := range count {
		if err := s.Remove(fmt.Sprintf("hostile-%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	s.healthy(0)
	s.arrives(counters["victim"], 10, tagged.Of(tagForbidden))
	s.quietWithin(0, map[string]*tagged.Counter{"good-0": counters["good-0"]})
	for i := range count {
		if err := s.Remove(fmt.Sprintf("good-%d", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Remove("late"); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error {
		if now := ourRules(t, s); now != empty {
			return fmt.Errorf("the policies are gone and left rules or sets:\n%s", now)
		}
		return nil
	})
	for _, counter := range counters {
		s.arrives(counter, 10, tagged.Of(tagForbidden))
	}
	summary(t, "%d hostile policies among %d good ones: status names %d, good ones hold", count, count, named)
}

// quietWithin demands that after the time nothing arrives that is forbidden.
func (s *stage) quietWithin(limit time.Duration, counters map[string]*tagged.Counter) {
	s.t.Helper()
	s.pause(limit)
	before := map[string]int{}
	for name, counter := range counters {
		before[name] = counter.Packets(tagged.Of(tagForbidden))
	}
	s.pause(closedPatience)
	for name, counter := range counters {
		if more := counter.Packets(tagged.Of(tagForbidden)) - before[name]; more > 0 {
			s.t.Errorf("%d packets arrived at %s, %v after it was isolated", more, name, limit)
		}
	}
}
