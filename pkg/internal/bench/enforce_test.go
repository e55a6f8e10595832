package bench

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/kubernetes"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// pace is the time between two changes, at least.
const pace = 100 * time.Millisecond

// change is one change of the policy. All its times are counted from when the request was sent: the server has committed it somewhere
// between that and committed, when the answer came.
type change struct {
	began     time.Time
	committed time.Duration
	// watched is when another client's watch had it.
	watched time.Duration
	// enforced is when the first SYN was sent that met the new verdict on every node.
	enforced time.Duration
	// rewritten is when the program that writes everything anew at each event had done so.
	rewritten time.Duration
}

// BenchmarkEnforce changes a policy that lets a pod in to another, ten times a second, in a cluster with a thousand policies, with a
// SYN each millisecond: from the change to the first packet that is judged anew.
func BenchmarkEnforce(b *testing.B) {
	for _, l := range []struct{ nodes, policies, pods int }{{1, 1000, 5000}, {2, 1000, 1000}} {
		b.Run(fmt.Sprintf("nodes=%d/policies=%d/pods=%d", l.nodes, l.policies, l.pods), func(b *testing.B) {
			s := newAPIStage(b, fmt.Sprintf("enforce%d", l.nodes), l.nodes)
			s.fill(l.pods, l.policies)
			var knockers []*knocker
			var servers []*lab.Pod
			for i := range s.Nodes {
				client, server := s.pod(i, fmt.Sprintf("client-%d", i), "client"), s.pod(i, fmt.Sprintf("server-%d", i), "server")
				knockers, servers = append(knockers, knock(b, client, server)), append(servers, server)
			}
			f := newFlipper(s, knockers)
			for range 4 {
				f.flip() // a first one finds caches cold
			}
			var changes []change
			for b.Loop() {
				changes = append(changes, f.flip())
			}
			f.report(changes)
			f.reportRestore(servers[0].Node)
			if l.nodes == 1 {
				f.reportRewriter(servers[0])
			}
		})
	}
}

// flipper changes the policy.
type flipper struct {
	*apiStage
	policy   *networkingv1.NetworkPolicy
	knockers []*knocker
	watch    *watcher
	open     bool
	// rewriter is the other program where one runs.
	rewriter *rewriter
	next     *time.Ticker
}

// newFlipper makes the policy, which lets nobody in.
func newFlipper(s *apiStage, knockers []*knocker) *flipper {
	s.b.Helper()
	f := &flipper{apiStage: s, knockers: knockers, watch: newWatcher(s.b, s.client), next: time.NewTicker(pace)}
	s.b.Cleanup(f.next.Stop)
	var err error
	f.policy, err = s.client.NetworkingV1().NetworkPolicies(namespace).Create(s.b.Context(), ingress(flipped, "server", "nobody", 0), metav1.CreateOptions{})
	if err != nil {
		s.b.Fatal(err)
	}
	began := time.Now() //nolint:forbidigo // a measurement
	f.settle(began, false)
	return f
}

// flipped is the policy that changes.
const flipped = "flipped"

// flip changes the policy once, and waits until the change is enforced on all nodes.
func (f *flipper) flip() change {
	f.b.Helper()
	f.open = !f.open
	who := "nobody"
	if f.open {
		who = "client"
	}
	f.policy.Spec.Ingress[0].From[0].PodSelector = app(who)
	<-f.next.C
	c := change{began: time.Now()} //nolint:forbidigo // a measurement
	since := func(t time.Time) time.Duration { return t.Sub(c.began) }
	updated, err := f.client.NetworkingV1().NetworkPolicies(namespace).Update(f.b.Context(), f.policy, metav1.UpdateOptions{})
	c.committed = since(time.Now()) //nolint:forbidigo // a measurement
	if err != nil {
		f.b.Fatal(err)
	}
	f.policy = updated
	f.settle(c.began, f.open)
	end := time.Now() //nolint:forbidigo // a measurement
	for _, k := range f.knockers {
		c.enforced = max(c.enforced, since(k.judgedAnew(c.began, end, f.open)))
	}
	c.watched = since(f.watch.when(updated.Generation))
	if f.rewriter != nil {
		c.rewritten = since(f.rewriter.when(who))
	}
	return c
}

// settle waits until all nodes judge as wanted.
func (f *flipper) settle(since time.Time, through bool) {
	f.b.Helper()
	for _, k := range f.knockers {
		f.eventually(func() error {
			if !k.settled(since, through) {
				return fmt.Errorf("packets do not meet the new policy: through should be %v", through)
			}
			return nil
		})
	}
}

// report reports the changes. A change counts from the answer of the server, except against the watch, which can be as early as that
// answer: there both count from the request.
func (f *flipper) report(changes []change) {
	var after, enforced, watched, wrote []time.Duration
	for _, c := range changes {
		after, enforced = append(after, c.enforced-c.committed), append(enforced, c.enforced)
		watched, wrote = append(watched, c.watched), append(wrote, c.committed)
	}
	f.b.ReportMetric(milliseconds(percentile(after, 0.5)), "p50-ms")
	f.b.ReportMetric(milliseconds(percentile(after, 0.99)), "p99-ms")
	f.b.ReportMetric(milliseconds(percentile(wrote, 0.5)), "write-p50-ms")
	f.b.ReportMetric(milliseconds(percentile(watched, 0.5)), "watch-p50-ms")
	f.b.ReportMetric(milliseconds(percentile(watched, 0.99)), "watch-p99-ms")
	f.b.ReportMetric(milliseconds(percentile(enforced, 0.5)), "request-p50-ms")
	f.b.ReportMetric(float64(percentile(enforced, 0.5))/float64(percentile(watched, 0.5)), "x-watch")
}

// reportRestore reports what a bare iptables-restore of one chain takes on a node, to compare with. Its rules stand before it ends.
func (f *flipper) reportRestore(node *lab.Node) {
	f.b.Helper()
	const program, chain = "iptables-restore", "BENCH"
	rules := netfilter.Chain{Table: "mangle", Name: chain, Rules: slices.Repeat([]netfilter.Rule{{Args: []string{"-j", "RETURN"}}}, 20)}
	text := netfilter.Delta{Table: rules.Table, Write: []netfilter.Chain{rules}}.Render()
	var took []time.Duration
	for range 50 {
		began := time.Now() //nolint:forbidigo // a measurement
		if err := node.Do(func() error { return execute(f.b.Context(), text, program, "--noflush", "-w", "10") }); err != nil {
			f.b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	f.b.ReportMetric(milliseconds(percentile(took, 0.5)), "restore-p50-ms")
}

// reportRewriter makes a few changes more while a program runs beside the daemon that writes everything anew at each event, and
// reports how much later that has done so than the packets met the daemon's rules.
func (f *flipper) reportRewriter(server *lab.Pod) {
	f.b.Helper()
	const changes = 10
	f.rewriter = startRewriter(f.apiStage, server)
	var rewritten, ratios []float64
	for range changes {
		c := f.flip()
		rewritten = append(rewritten, milliseconds(c.rewritten-c.committed))
		ratios = append(ratios, float64(c.rewritten)/float64(c.enforced))
	}
	f.b.ReportMetric(percentile(rewritten, 0.5), "rewrite-p50-ms")
	f.b.ReportMetric(percentile(ratios, 0.5), "x-rewrite")
}

// watcher is another client that watches the policy and does nothing else.
type watcher struct {
	mu   sync.Mutex
	seen map[int64]time.Time
	b    *testing.B
}

// newWatcher starts to watch.
func newWatcher(b *testing.B, client kubernetes.Interface) *watcher {
	b.Helper()
	ctx, stop := context.WithCancel(b.Context())
	events, err := client.NetworkingV1().NetworkPolicies(namespace).Watch(ctx, metav1.ListOptions{
		FieldSelector: fields.OneTermEqualSelector(metav1.ObjectNameField, flipped).String(),
	})
	if err != nil {
		b.Fatal(err)
	}
	w := &watcher{seen: map[int64]time.Time{}, b: b}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for event := range events.ResultChan() {
			if policy, ok := event.Object.(*networkingv1.NetworkPolicy); ok {
				w.mu.Lock()
				w.seen[policy.Generation] = time.Now() //nolint:forbidigo // a measurement
				w.mu.Unlock()
			}
		}
	}()
	b.Cleanup(func() {
		stop()
		<-done
	})
	return w
}

// when returns when the watch had a generation of the policy.
func (w *watcher) when(generation int64) (at time.Time) {
	w.b.Helper()
	ctx, cancel := context.WithTimeout(w.b.Context(), patience)
	defer cancel()
	err := lab.Until(ctx, func() error {
		w.mu.Lock()
		defer w.mu.Unlock()
		var ok bool
		if at, ok = w.seen[generation]; !ok {
			return fmt.Errorf("the watch has no generation %d", generation)
		}
		return nil
	})
	if err != nil {
		w.b.Fatal(err)
	}
	return at
}
