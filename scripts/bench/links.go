package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec" //nolint:depguard // the plugins are programs, and how long one takes is what is measured
	"path/filepath"
	"slices"
	"time"

	"github.com/containernetworking/plugins/pkg/testutils"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/warren-cni/warren/pkg/lab"
)

// peer names what the plugin is measured against.
const peer = "ptp + host-local"

// storm is how many plugins start together in the benchmarks of concurrency: what a node does when its pods come back.
const storm = 8

// crowd is how many more pods there are on a full node.
const crowd = 250 - storm

// load is what one pair of benchmarks, ADD and DEL, does in a round.
type load struct {
	name         string
	pods, atOnce int
	dual         bool
	// chained is set for the whole conflist, in place of its first plugin alone.
	chained bool
	// most is what ADD and DEL may take of what the peer takes.
	most [2]float64
}

// loads are IPv4 alone, and both families, for which ptp waits a second or two for duplicate address detection, so that
// fewer of them tell the same.
func loads() []load {
	return []load{
		{name: "IPv4, one at a time", pods: storm, atOnce: 1, most: [2]float64{0.45, 0.25}},
		{name: "IPv4, 8 at once", pods: storm, atOnce: storm, most: [2]float64{0.5, 0.25}},
		{name: "conflist, one at a time", pods: storm, atOnce: 1, chained: true, most: [2]float64{1, 1}},
		{name: "conflist, 8 at once", pods: storm, atOnce: storm, chained: true, most: [2]float64{1, 1}},
		{name: "dual stack, one at a time", pods: 2, atOnce: 1, dual: true, most: [2]float64{0.45, 0.25}},
		{name: "dual stack, 8 at once", pods: storm, atOnce: storm, dual: true, most: [2]float64{0.5, 0.25}},
	}
}

// measureLinks measures ADD and DEL of the plugin, one at a time and several at once, with the real daemon behind it.
// Leases of both contenders are on the same tmpfs.
func measureLinks(ctx context.Context, s settings) ([]line, error) {
	binaries := s.binaries
	peers := filepath.Join(binaries, "bench")
	for name, pkg := range map[string]string{
		"ptp": "main/ptp", "host-local": "ipam/host-local", "portmap": "meta/portmap", "bandwidth": "meta/bandwidth",
	} {
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(peers, name), //nolint:gosec // constants
			"github.com/containernetworking/plugins/plugins/"+pkg)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("building %s: %w\n%s", name, err, out)
		}
	}
	dir, err := os.MkdirTemp("/dev/shm", "wb-")
	if err != nil {
		return nil, fmt.Errorf("making a directory: %w", err)
	}
	network, err := lab.New(ctx, lab.Options{
		Name: "wrnbench", Dir: dir, Nodes: 1, Warrend: filepath.Join(binaries, "warrend"), Plugins: []string{binaries},
	})
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	measured, err := measureOn(ctx, network, s)
	return measured, errors.Join(err, network.Close(ctx), os.RemoveAll(dir))
}

// measureOn starts the daemon on the lab's node, makes the pods' namespaces, and measures.
func measureOn(ctx context.Context, network *lab.Lab, s settings) ([]line, error) {
	node := network.Nodes[0]
	if _, err := node.StartTunnel(ctx); err != nil {
		return nil, err
	}
	daemon, err := node.StartDaemon(ctx, nil)
	if err != nil {
		return nil, err
	}
	if err = node.Ready(ctx, daemon, 0); err != nil {
		return nil, fmt.Errorf("%w\n%s", err, daemon.Log(20))
	}
	pods, closePods, err := makePods(network, node)
	if err != nil {
		return nil, errors.Join(err, closePods())
	}
	contenders, err := newContenders(node, daemon, s.binaries)
	if err != nil {
		return nil, errors.Join(err, closePods())
	}
	b := &bench{
		node: node, pods: pods, contenders: contenders,
		clock: time.Now, //nolint:forbidigo // the process's edge: here the clock comes from
	}
	var measured []line
	for _, l := range loads() {
		more, loadErr := b.measure(ctx, l, s.rounds)
		if loadErr != nil {
			return nil, errors.Join(fmt.Errorf("%s: %w", l.name, loadErr), closePods())
		}
		measured = append(measured, more...)
	}
	more, err := b.measureOwn(ctx, s.rounds)
	return append(measured, more...), errors.Join(err, closePods())
}

// measureOwn holds Warren against itself: both families against one, and in both the last pods of a full node against the first.
func (b *bench) measureOwn(ctx context.Context, rounds int) ([]line, error) {
	first, last := b.pods[:storm], b.pods[storm:]
	each := func(dual bool) (took [2]float64, err error) {
		for j, command := range []string{"ADD", "DEL"} {
			for _, p := range first {
				work := batch{contender: b.contenders[0], command: command, load: load{dual: dual}, pods: []pod{p}}
				begin := b.clock()
				if _, err = b.runAtOnce(ctx, work); err != nil {
					return took, fmt.Errorf("%s: %w", command, err)
				}
				took[j] += milliseconds(b.clock().Sub(begin)) / storm
			}
		}
		return took, b.settle(ctx)
	}
	all := func(command string) error {
		for pods := range slices.Chunk(last, storm) {
			if _, err := b.runAtOnce(ctx, batch{contender: b.contenders[0], command: command, load: load{dual: true}, pods: pods}); err != nil {
				return fmt.Errorf("%s of the crowd: %w", command, err)
			}
		}
		return b.settle(ctx)
	}
	var single, dual, crowded [2][]float64
	for range rounds {
		alone, err1 := each(false)
		both, err2 := each(true)
		err3 := all("ADD")
		full, err4 := each(true)
		if err := errors.Join(err1, err2, err3, err4, all("DEL")); err != nil {
			return nil, err
		}
		for j := range single {
			single[j] = append(single[j], alone[j])
			dual[j] = append(dual[j], both[j])
			crowded[j] = append(crowded[j], full[j])
		}
	}
	var lines []line
	for j, command := range []string{"ADD", "DEL"} {
		for _, l := range []struct {
			figure      string
			took, first []float64
			most        float64
		}{
			{command + " dual stack of IPv4", dual[j], single[j], 1.1},
			{command + " dual stack on a node with 250 pods of the first", crowded[j], dual[j], 1.05},
		} {
			ratios := make([]float64, rounds)
			for i := range ratios {
				ratios[i] = l.took[i] / l.first[i]
			}
			lines = append(lines, line{
				Figure: "x " + l.figure, Value: median(ratios), Target: l.most, Rounds: rounds,
				Details: map[string]float64{"ms": median(l.took), "first-ms": median(l.first)}, beside: []string{"ms", "first-ms"},
			}.hold())
		}
	}
	return lines, nil
}

// pod is what a runtime hands to a plugin.
type pod struct {
	id, netns, args string
	// result is that of its last ADD, nil without one.
	result *json.RawMessage
}

// makePods makes the namespaces and objects of the pods, and returns what takes the namespaces away.
func makePods(network *lab.Lab, node *lab.Node) ([]pod, func() error, error) {
	var pods []pod
	var closers []func() error
	closeAll := func() error {
		var errs []error
		for _, c := range closers {
			errs = append(errs, c())
		}
		return errors.Join(errs...)
	}
	// In one file: the daemon reads all files again for each pod that starts, which with an API server it does not.
	objects := []any{corev1.Namespace{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Namespace"}, ObjectMeta: metav1.ObjectMeta{Name: "bench"},
	}}
	for i := range storm + crowd {
		name := fmt.Sprintf("pod-%d", i)
		objects = append(objects, corev1.Pod{
			TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
			ObjectMeta: metav1.ObjectMeta{Namespace: "bench", Name: name, UID: types.UID(name)},
			Spec:       corev1.PodSpec{NodeName: node.Name, Containers: []corev1.Container{{Name: "main", Image: "none"}}},
		})
		space, spaceErr := testutils.NewNS()
		if spaceErr != nil {
			return nil, closeAll, fmt.Errorf("making a network namespace: %w", spaceErr)
		}
		closers = append(closers, space.Close, func() error { return testutils.UnmountNS(space) })
		pods = append(pods, pod{
			id: "bench-" + name, netns: space.Path(),
			args:   "IgnoreUnknown=1;K8S_POD_NAMESPACE=bench;K8S_POD_NAME=" + name + ";K8S_POD_UID=" + name,
			result: new(json.RawMessage),
		})
	}
	return pods, closeAll, network.Write("pods", objects...)
}
