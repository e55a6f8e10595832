package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec" //nolint:depguard // the plugins are programs, and how long one takes is what is measured
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/podlink"
)

// userHZ is the unit of the times in /proc/<pid>/stat, the same on every Linux.
const userHZ = 100

// contenders is how many take part: Warren, then the peer.
const contenders = 2

// contender is a chain of plugins, of which the first wires the pod.
type contender struct {
	plugins []plugin
	path    string
	// daemon is the process that takes part in every operation, or nil.
	daemon *lab.Process
}

// plugin is a program with its configurations for one family and for both.
type plugin struct {
	binary     string
	ipv4, both map[string]any
}

// newContenders returns Warren, configured as its daemon configured it, and the peer, each with the plugins of Warren's conflist after it.
func newContenders(node *lab.Node, daemon *lab.Process, binaries string) ([contenders]contender, error) {
	text, err := os.ReadFile(node.Conflist())
	if err != nil {
		return [contenders]contender{}, fmt.Errorf("reading the conflist: %w", err)
	}
	var conflist struct {
		Plugins []map[string]any `json:"plugins"`
	}
	if err = json.Unmarshal(text, &conflist); err != nil {
		return [contenders]contender{}, fmt.Errorf("reading the conflist: %w", err)
	}
	peers := filepath.Join(binaries, "bench")
	var chained []plugin
	for _, c := range conflist.Plugins {
		c["name"], c["cniVersion"] = "bench", "1.0.0"
		kind, _ := c["type"].(string)
		chained = append(chained, plugin{binary: filepath.Join(peers, kind), ipv4: c, both: c})
	}
	own := chained[0].both
	first := maps.Clone(own)
	first["ranges"] = []string{node.PodCIDRs[0].String()}
	dir := filepath.Dir(node.Leases())
	ours := plugin{binary: filepath.Join(binaries, "warren"), ipv4: first, both: own}
	theirs := plugin{
		binary: filepath.Join(peers, "ptp"),
		ipv4:   ptp(dir, own["mtu"], "10.99.0.0/24"), both: ptp(dir, own["mtu"], "10.99.0.0/24", "fd99::/64"),
	}
	return [contenders]contender{
		{plugins: append([]plugin{ours}, chained[1:]...), path: binaries, daemon: daemon},
		{plugins: append([]plugin{theirs}, chained[1:]...), path: peers},
	}, nil
}

// ptp is the peer's configuration.
func ptp(dir string, mtu any, subnets ...string) map[string]any {
	var ranges [][]map[string]string
	var routes []map[string]string
	for _, s := range subnets {
		everywhere := "0.0.0.0/0"
		if strings.Contains(s, ":") {
			everywhere = "::/0"
		}
		ranges = append(ranges, []map[string]string{{"subnet": s}})
		routes = append(routes, map[string]string{"dst": everywhere})
	}
	return map[string]any{
		"name": "peer", "cniVersion": "1.0.0", "type": "ptp", "mtu": mtu,
		"ipam": map[string]any{"type": "host-local", "dataDir": filepath.Join(dir, "host-local"), "ranges": ranges, "routes": routes},
	}
}

// bench runs operations and takes their times.
type bench struct {
	node       *lab.Node
	pods       []pod
	contenders [contenders]contender
	clock      func() time.Time
}

// batch is the same command for a number of pods at once.
type batch struct {
	contender
	command string
	load
	pods []pod
}

// tally is what the rounds of one command took.
type tally struct {
	// took and cpu are the times of one operation in milliseconds, of the wall's clock and of the processors of every process that
	// took part.
	took, cpu [contenders][]float64
}

// line sums a command up. The value is the median of the rounds' ratios, so that what slows a round down, and both contenders
// with it, does not count.
func (t tally) line(figure string, most float64) line {
	ratios := make([]float64, len(t.took[0]))
	for i := range ratios {
		ratios[i] = t.took[0][i] / t.took[1][i]
	}
	return line{
		Figure: figure, Value: median(ratios), Target: most, Rounds: len(ratios),
		Details: map[string]float64{
			"ms": median(t.took[0]), "peer-ms": median(t.took[1]), "cpu-ms": median(t.cpu[0]), "peer-cpu-ms": median(t.cpu[1]),
		},
		beside: []string{"ms", "peer-ms", "cpu-ms", "peer-cpu-ms"},
	}.hold()
}

// measure runs one load. The contenders take turns after every batch, so that what else the machine does meets both, and a
// first round does not count.
func (b *bench) measure(ctx context.Context, l load, rounds int) ([]line, error) {
	var tallies [2]tally
	commands := []string{"ADD", "DEL"}
	for round := range rounds + 1 {
		var took, cpu [2][contenders]time.Duration
		for pods := range slices.Chunk(b.pods[:l.pods], l.atOnce) {
			for i, c := range b.contenders {
				for j, command := range commands {
					wall, processor, err := b.run(ctx, batch{contender: c, command: command, load: l, pods: pods})
					if err != nil {
						return nil, err
					}
					took[j][i] += wall
					cpu[j][i] += processor
				}
			}
		}
		if round == 0 {
			continue
		}
		for j := range tallies {
			for i := range b.contenders {
				tallies[j].took[i] = append(tallies[j].took[i], milliseconds(took[j][i])/float64(l.pods))
				tallies[j].cpu[i] = append(tallies[j].cpu[i], milliseconds(cpu[j][i])/float64(l.pods))
			}
		}
	}
	var lines []line
	for j, command := range commands {
		lines = append(lines, tallies[j].line("x "+command+" "+l.name, l.most[j]))
	}
	return lines, nil
}

// milliseconds converts to the unit of the report.
func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// run runs a batch in the node's namespace, and returns its time and the processor time of all that took part. What is left to the
// daemon takes none of the batch's time, but its processor time counts.
func (b *bench) run(ctx context.Context, work batch) (took, cpu time.Duration, err error) {
	before, err := work.daemonCPU()
	if err != nil {
		return 0, 0, err
	}
	begin := b.clock()
	cpu, err = b.runAtOnce(ctx, work)
	took = b.clock().Sub(begin)
	if err == nil && work.command == "DEL" && work.daemon != nil {
		err = b.settle(ctx)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("%s %s: %w", filepath.Base(work.plugins[0].binary), work.command, err)
	}
	after, err := work.daemonCPU()
	return took, cpu + after - before, err
}

// settle waits until the daemon has ended what DEL leaves to it, and deletes the links of a DEL that came while the daemon did: the next one in
// the pod's namespace is the peer's, which does not expect one there.
func (b *bench) settle(ctx context.Context) error {
	return errors.Join(b.node.EndCoolDown(ctx), b.node.Do(podlink.Sweep))
}

// runAtOnce runs the command for all pods together, and returns the processor time of the programs. Each needs a thread of its own in
// the node's namespace.
func (b *bench) runAtOnce(ctx context.Context, work batch) (time.Duration, error) {
	errs := make([]error, len(work.pods))
	cpu := make([]time.Duration, len(work.pods))
	var all sync.WaitGroup
	for i, p := range work.pods {
		all.Go(func() {
			errs[i] = b.node.Do(func() (err error) {
				cpu[i], err = work.operate(ctx, p)
				return err
			})
		})
	}
	all.Wait()
	var sum time.Duration
	for _, c := range cpu {
		sum += c
	}
	return sum, errors.Join(errs...)
}

// operate runs the command for a pod, as a runtime calls the plugins of a chain.
func (w batch) operate(ctx context.Context, p pod) (time.Duration, error) {
	chain := w.plugins[:1]
	if w.chained {
		chain = w.plugins
	}
	if w.command == "DEL" {
		chain = slices.Clone(chain)
		slices.Reverse(chain)
	}
	var cpu time.Duration
	for _, one := range chain {
		cmd, err := w.prepare(ctx, one, p)
		if err != nil {
			return 0, err
		}
		var out bytes.Buffer
		cmd.Stdout = &out
		if err = cmd.Run(); err != nil {
			return 0, fmt.Errorf("%s: %w: %s", filepath.Base(one.binary), err, out.Bytes())
		}
		cpu += cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime() // with the programs that it ran itself
		if w.command == "ADD" {
			*p.result = out.Bytes()
		}
	}
	if w.command == "DEL" {
		*p.result = nil
	}
	return cpu, nil
}

// prepare makes the command of one plugin for a pod.
func (w batch) prepare(ctx context.Context, one plugin, p pod) (*exec.Cmd, error) {
	config := maps.Clone(one.ipv4)
	if w.dual {
		config = maps.Clone(one.both)
	}
	if *p.result != nil {
		config["prevResult"] = *p.result
	}
	stdin, err := json.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("encoding a configuration: %w", err)
	}
	cmd := exec.CommandContext(ctx, one.binary) //nolint:gosec // one of the contenders
	cmd.Env = []string{
		"CNI_COMMAND=" + w.command, "CNI_CONTAINERID=" + p.id, "CNI_NETNS=" + p.netns, "CNI_IFNAME=eth0",
		"CNI_PATH=" + w.path, "CNI_ARGS=" + p.args,
	}
	cmd.Stdin = bytes.NewReader(stdin)
	return cmd, nil
}

// daemonCPU returns the processor time that the contender's daemon has used, zero where it has none.
func (c contender) daemonCPU() (time.Duration, error) {
	if c.daemon == nil {
		return 0, nil
	}
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.daemon.PID()))
	if err != nil {
		return 0, fmt.Errorf("reading the daemon's processor time: %w", err)
	}
	// The second field is the program's name, in parentheses; utime and stime are the fields 14 and 15 (proc(5)).
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	var ticks int
	for _, field := range fields[11:13] {
		n, parseErr := strconv.Atoi(field)
		if parseErr != nil {
			return 0, fmt.Errorf("reading the daemon's processor time: %w", parseErr)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / userHZ, nil
}
