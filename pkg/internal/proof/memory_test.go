package proof

import (
	"bufio"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/warren-cni/warren/pkg/internal/measure"
	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
)

// What the soak is made of: two hours with 20 changes a second.
const (
	crowdNodes   = 200
	crowdPods    = 5000
	crowdLocal   = 10
	crowdChanges = 2 * 60 * 60 * changesPace
	// changesPace is how many changes come in a second; a short run has its fewer changes as fast as the API server takes them.
	changesPace = 20
	// crowdWriters is how many clients change things, each its own.
	crowdWriters = 8
	// metricsAddress is where the daemon tells of its memory.
	metricsAddress = "127.0.0.1:9476"
)

// sample is what the daemon and the tunnel's process need at a moment.
type sample struct {
	// goal is the size of the heap at which garbage is next collected: twice what was in use when that was done last.
	goal                          float64
	resident, descriptors, stacks float64
	// tunnel is the resident memory of the tunnel's process.
	tunnel float64
}

// flat is an error where the last third of the samples needs more than the one before it. The first third is the beginning.
func flat(samples []sample) error {
	third := len(samples) / 3
	if third < 10 {
		return fmt.Errorf("there are only %d samples", len(samples))
	}
	var errs []error
	for _, what := range []struct {
		name  string
		of    func(sample) float64
		slack func(float64) float64
	}{
		{"heap", func(s sample) float64 { return s.goal }, func(before float64) float64 { return before*1.10 + 1<<20 }},
		{"resident memory", func(s sample) float64 { return s.resident }, func(before float64) float64 { return before*1.15 + 4<<20 }},
		{"open files", func(s sample) float64 { return s.descriptors }, func(before float64) float64 { return before + 8 }},
		{"goroutines", func(s sample) float64 { return s.stacks }, func(before float64) float64 { return before + 16 }},
		{"the tunnel", func(s sample) float64 { return s.tunnel }, func(before float64) float64 { return before*1.15 + 4<<20 }},
	} {
		before, after := median(samples[third:2*third], what.of), median(samples[2*third:], what.of)
		if after > what.slack(before) {
			errs = append(errs, fmt.Errorf("%s grew from %.0f to %.0f", what.name, before, after))
		}
	}
	return errors.Join(errs...)
}

// median is the middle one of what samples say.
func median(samples []sample, of func(sample) float64) float64 {
	var values []float64
	for _, s := range samples {
		values = append(values, of(s))
	}
	slices.Sort(values)
	return values[len(values)/2]
}

// flat sees what grows slowly, and not what goes up and down.
func TestFlat(t *testing.T) {
	t.Parallel()
	steady := func(i int) sample {
		return sample{40e6 + float64(i%7)*1e6, 80e6 + float64(i%5)*2e6, 20 + float64(i%3), 50 + float64(i%11), 20e6 + float64(i%4)*1e6}
	}
	for name, c := range map[string]struct {
		n      int
		change func(i int, s *sample)
		grows  string
	}{
		"steady":          {300, func(int, *sample) {}, ""},
		"a busy start":    {300, func(i int, s *sample) { s.goal += float64(max(0, 90-i)) * 1e6 }, ""},
		"a filling start": {300, func(i int, s *sample) { s.goal += float64(min(i, 90)) * 1e6 }, ""},
		"few samples":     {20, func(int, *sample) {}, "only 20 samples"},
		"the heap":        {300, func(i int, s *sample) { s.goal += float64(i) * 80e3 }, "heap grew"},
		"what is mapped":  {300, func(i int, s *sample) { s.resident += float64(i) * 300e3 }, "resident memory grew"},
		"descriptors":     {300, func(i int, s *sample) { s.descriptors += float64(i / 8) }, "open files grew"},
		"goroutines":      {300, func(i int, s *sample) { s.stacks += float64(i / 4) }, "goroutines grew"},
		"the tunnel":      {300, func(i int, s *sample) { s.tunnel += float64(i) * 100e3 }, "the tunnel grew"},
	} {
		var samples []sample
		for i := range c.n {
			s := steady(i)
			c.change(i, &s)
			samples = append(samples, s)
		}
		err := flat(samples)
		if c.grows == "" && err != nil || c.grows != "" && (err == nil || !strings.Contains(err.Error(), c.grows)) {
			t.Errorf("%s: got %v, want %q", name, err, c.grows)
		}
	}
}

// crowd is a cluster that never rests.
type crowd struct {
	*cluster
	nodes, pods int
	done, want  atomic.Int64
	// ticks paces the changes; without it they come as they can.
	ticks <-chan time.Time
}

// With so many nodes and pods, and so many changes to pods, policies, namespaces and the node's own pods, the daemon needs no more
// memory, open files and goroutines in the end than in the middle, the tunnel no more memory, and a clean-up leaves nothing.
func TestProofMemoryFlat(t *testing.T) {
	t.Parallel()
	r := soak.Random(t)
	name, long := "wpmemory", soak.Trials(crowdChanges) == crowdChanges
	if long {
		name = "wpmemsoak" // a short run beside it would take its nodes for what a killed test left
	}
	c := &crowd{
		cluster: newCluster(t, name, "--metrics-address", metricsAddress),
		nodes:   soak.Trials(crowdNodes), pods: soak.Trials(crowdPods),
	}
	c.want.Store(int64(soak.Trials(crowdChanges)))
	if long {
		ticker := time.NewTicker(time.Second / changesPace)
		defer ticker.Stop()
		c.ticks = ticker.C
	}
	for _, name := range namespaceNames() {
		c.createNamespace(name)
	}
	c.createPeers()
	writers := c.writers(r)
	c.eventually(func() error {
		status, err := c.node.Status(t.Context())
		if err == nil && (len(status.Peers) != c.nodes-3 || status.Policies.Policies != crowdWriters) {
			err = fmt.Errorf("the node knows %d peers and %d policies", len(status.Peers), status.Policies.Policies)
		}
		return err
	})

	started := time.Now() //nolint:forbidigo // for the log
	samples := c.run(writers)
	lasted := time.Since(started)
	if err := flat(samples); err != nil {
		t.Error(err)
	}
	first, last := samples[len(samples)/3], samples[len(samples)-1]
	t.Logf("proof: %d changes in %v (%.0f a second) with %d nodes and %d pods: the heap's goal %.1f MB after a third and %.1f MB at the end, "+
		"resident %.1f and %.1f MB, %.0f and %.0f open files, %.0f and %.0f goroutines, the tunnel's process %.1f and %.1f MB, of %d samples",
		c.done.Load(), lasted.Round(time.Second), float64(c.done.Load())/lasted.Seconds(), c.nodes, c.pods,
		first.goal/1e6, last.goal/1e6, first.resident/1e6, last.resident/1e6, first.descriptors, last.descriptors, first.stacks, last.stacks,
		first.tunnel/1e6, last.tunnel/1e6, len(samples))
	c.cleansUp()
}

// run lets all writers write until there were enough changes, and returns what daemon and tunnel needed meanwhile.
func (c *crowd) run(writers []*writer) (samples []sample) {
	c.t.Helper()
	var group sync.WaitGroup
	for _, w := range writers {
		group.Go(func() {
			for c.done.Load() < c.want.Load() && !c.t.Failed() {
				w.change()
			}
		})
	}
	ended := make(chan struct{})
	go func() {
		group.Wait()
		close(ended)
	}()
	every := 200 * time.Millisecond
	if c.ticks != nil {
		every = 10 * time.Second
	}
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		select {
		case <-ended:
			return samples
		case <-ticker.C:
			s, err := c.sample()
			if err != nil {
				c.t.Error(err)
				<-ended
				return samples
			}
			samples = append(samples, s)
		}
	}
}

// sample asks the daemon what it needs, and the kernel what the tunnel's process does.
func (c *crowd) sample() (sample, error) {
	values := map[string]float64{}
	err := c.node.Do(func() error {
		connection, err := new(net.Dialer).DialContext(c.t.Context(), "tcp", metricsAddress)
		if err != nil {
			return err
		}
		defer connection.Close() //nolint:errcheck // what it said has been read
		if _, err = io.WriteString(connection, "GET /metrics HTTP/1.0\r\n\r\n"); err != nil {
			return err
		}
		lines := bufio.NewScanner(connection)
		for lines.Scan() {
			name, text, _ := strings.Cut(lines.Text(), " ")
			if value, err := strconv.ParseFloat(text, 64); err == nil {
				values[name] = value
			}
		}
		return lines.Err()
	})
	s := sample{
		values["go_memstats_next_gc_bytes"], values["process_resident_memory_bytes"], values["process_open_fds"], values["go_goroutines"], 0,
	}
	if err == nil && (s.goal == 0 || s.resident == 0 || s.descriptors == 0 || s.stacks == 0) {
		err = fmt.Errorf("the daemon does not tell what it needs: %+v", s)
	}
	if err != nil {
		return s, err
	}
	child, err := c.tunnel.Child(c.t.Context()) // which has the peers
	if err != nil {
		return s, err
	}
	tunnel, err := measure.Resident(child)
	s.tunnel = float64(tunnel)
	return s, err
}

// cleansUp stops all that runs, and cleans up with the pods still there.
func (c *crowd) cleansUp() {
	c.t.Helper()
	ctx := context.WithoutCancel(c.t.Context())
	before, err := c.node.Leftovers(ctx)
	if err = errors.Join(err, c.daemon.Stop(), c.tunnel.Stop()); err != nil || len(before) < c.pods/100 {
		c.t.Fatalf("stopping: %v; of Warren's there was %q", err, before)
	}
	if out, err := c.node.Command(ctx, "cleanup"); err != nil {
		c.t.Fatalf("%v\n%s", err, out)
	}
	if left, err := c.node.Leftovers(ctx); err != nil || len(left) > 0 {
		c.t.Errorf("the clean-up left %q (%v)", left, err)
	}
	c.t.Logf("proof: the clean-up took away %d rules, sets, links, routes and files, and left 0", len(before))
}

// createPeers makes the other Nodes, each with a key of its own.
func (c *crowd) createPeers() {
	c.t.Helper()
	for number := 4; number <= c.nodes; number++ {
		c.createNode(number)
		name := fmt.Sprintf("node-%d", number)
		node, err := c.client.CoreV1().Nodes().Get(c.t.Context(), name, metav1.GetOptions{})
		if err != nil {
			c.t.Fatal(err)
		}
		private, err := wgtypes.GeneratePrivateKey()
		if err != nil {
			c.t.Fatal(err)
		}
		proof, err := keyproof.Sign(private, name, string(node.UID))
		if err != nil {
			c.t.Fatal(err)
		}
		node.Annotations = map[string]string{
			kube.AnnotationPublicKey: private.PublicKey().String(), kube.AnnotationPort: "51820",
			kube.AnnotationKeyProof: base64.StdEncoding.EncodeToString(proof[:]),
		}
		if _, err = c.client.CoreV1().Nodes().Update(c.t.Context(), node, metav1.UpdateOptions{}); err != nil {
			c.t.Fatal(err)
		}
	}
}

// writer changes pods and a policy of its own.
type writer struct {
	*crowd
	number int
	r      *rand.Rand
	// slots are pods of other nodes: each is replaced by one that has its address.
	slots []slot
	// locals are pods of the node; one writer has them all.
	locals []*local
	made   int
}

// slot is a place for a pod on another node.
type slot struct {
	node string
	host int
	at   int
	pod  *corev1.Pod
}

// writers makes those who change things, with the pods and policies that they change.
func (c *crowd) writers(r *rand.Rand) (all []*writer) {
	c.t.Helper()
	for i := range crowdWriters {
		all = append(all, &writer{crowd: c, number: i, r: rand.New(rand.NewPCG(r.Uint64(), 0))})
	}
	perNode := c.pods / c.nodes
	for i := range c.pods {
		at := 2 + i/perNode%(c.nodes-1)
		w := all[i%crowdWriters]
		w.slots = append(w.slots, slot{node: fmt.Sprintf("node-%d", at), at: at, host: 2 + i/perNode/(c.nodes-1)*perNode + i%perNode})
	}
	var group sync.WaitGroup
	for _, w := range all {
		group.Go(func() {
			for i := range w.slots {
				w.fill(&w.slots[i])
			}
			w.writePolicy(true)
			for range crowdLocal {
				if w.number == 0 {
					w.addLocal()
				}
			}
		})
	}
	group.Wait()
	if c.t.Failed() {
		c.t.FailNow()
	}
	return all
}

// did counts changes, and waits until the next may come.
func (w *writer) did(n int) {
	w.done.Add(int64(n))
	for range n {
		if w.ticks != nil {
			<-w.ticks
		}
	}
}

// change makes one random change, or a few that belong together.
func (w *writer) change() {
	switch n := w.r.IntN(100); {
	case n < 45:
		s := &w.slots[w.r.IntN(len(w.slots))]
		s.pod = w.relabel(s.pod, pick(w.r, labelSets()))
		w.did(1)
	case n < 85:
		s := &w.slots[w.r.IntN(len(w.slots))]
		w.deletePod(s.pod)
		w.fill(s)
		w.did(3)
	case n < 95:
		w.writePolicy(false)
		w.did(1)
	case n < 98 && w.number == 0:
		w.replaceLocal()
		w.did(3)
	default:
		w.relabelNamespace()
		w.did(1)
	}
}

// fill makes the pod of a slot.
func (w *writer) fill(s *slot) {
	w.made++
	pod := w.createPod(pick(w.r, namespaceNames()), fmt.Sprintf("far-%d-%d", w.number, w.made), s.node, pick(w.r, labelSets()))
	w.setStatus(pod, corev1.PodRunning, fmt.Sprintf("10.244.%d.%d", s.at, s.host), fmt.Sprintf("fd00:10:244:%d::%x", s.at, s.host))
	s.pod = pod
}

// writePolicy creates the writer's policy or changes it.
func (w *writer) writePolicy(create bool) {
	policies := w.client.NetworkingV1().NetworkPolicies(namespaceNames()[w.number%len(namespaceNames())])
	policy := &networkingv1.NetworkPolicy{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("policy-%d", w.number)}, Spec: randomSpec(w.r)}
	var err error
	if create {
		_, err = policies.Create(w.t.Context(), policy, metav1.CreateOptions{})
	} else {
		_, err = policies.Update(w.t.Context(), policy, metav1.UpdateOptions{})
	}
	if err != nil {
		w.t.Error(err)
	}
}

// relabelNamespace gives a namespace another team.
func (w *writer) relabelNamespace() {
	patch := fmt.Appendf(nil, `{"metadata":{"labels":{"team":%q}}}`, pick(w.r, []string{"red", "blue"}))
	_, err := w.client.CoreV1().Namespaces().Patch(w.t.Context(), pick(w.r, namespaceNames()), types.MergePatchType, patch, metav1.PatchOptions{})
	if err != nil {
		w.t.Error(err)
	}
}

// addLocal makes a pod of the node.
func (w *writer) addLocal() {
	w.made++
	name := fmt.Sprintf("near-%d", w.made)
	object := w.createPod(pick(w.r, namespaceNames()), name, "node-1", pick(w.r, labelSets()))
	pod, err := w.node.AddPod(w.t.Context(), lab.Pod{Namespace: object.Namespace, Name: name, UID: object.UID})
	if err != nil {
		w.t.Error(err)
		return
	}
	w.setStatus(object, corev1.PodRunning, pod.Addresses[0].String(), pod.Addresses[1].String())
	w.locals = append(w.locals, &local{object: object, pod: pod})
}

// replaceLocal deletes the oldest pod of the node and makes another one.
func (w *writer) replaceLocal() {
	if len(w.locals) == 0 {
		return // one did not start: the test has failed
	}
	oldest := w.locals[0]
	w.locals = w.locals[1:]
	if err := oldest.pod.Delete(w.t.Context()); err != nil {
		w.t.Error(err)
	}
	w.deletePod(oldest.object)
	w.addLocal()
}
