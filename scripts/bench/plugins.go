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
)

// userHZ is the unit of the times in /proc/<pid>/stat, the same on every Linux.
const userHZ = 100

// contenders is how many take part: Warren, then the peer.
const contenders = 2

// contender is a plugin with its configuration.
type contender struct {
	binary, path string
	// ipv4 and both are the configurations for one family and for both.
	ipv4, both []byte
	// daemon is the process that takes part in every operation, or nil.
	daemon *lab.Process
}

// newContenders returns Warren, configured as its daemon configured it, and the peer.
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
	own := conflist.Plugins[0]
	own["name"], own["cniVersion"] = "bench", "1.0.0"
	first := maps.Clone(own)
	first["ranges"] = []string{node.PodCIDRs[0].String()}
	peers := filepath.Join(binaries, "bench")
	ours := contender{binary: filepath.Join(binaries, "warren"), path: binaries, daemon: daemon}
	theirs := contender{binary: filepath.Join(peers, "ptp"), path: peers}
	for to, from := range map[*[]byte]any{
		&ours.ipv4: first, &ours.both: own,
		&theirs.ipv4: ptp(filepath.Dir(node.Leases()), own["mtu"], "10.99.0.0/24"),
		&theirs.both: ptp(filepath.Dir(node.Leases()), own["mtu"], "10.99.0.0/24", "fd99::/64"),
	} {
		if *to, err = json.Marshal(from); err != nil {
			return [contenders]contender{}, fmt.Errorf("encoding a configuration: %w", err)
		}
	}
	return [contenders]contender{ours, theirs}, nil
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
	dual    bool
	pods    []pod
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
		// However fast and many the rounds are, they do not use up the range.
		if err := b.node.EndCoolDown(); err != nil {
			return nil, err
		}
		var took, cpu [2][contenders]time.Duration
		for pods := range slices.Chunk(b.pods[:l.pods], l.atOnce) {
			for i, c := range b.contenders {
				for j, command := range commands {
					wall, processor, err := b.run(ctx, batch{contender: c, command: command, dual: l.dual, pods: pods})
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

// run runs a batch in the node's namespace, and returns its time and the processor time of all that took part.
func (b *bench) run(ctx context.Context, work batch) (took, cpu time.Duration, err error) {
	before, err := work.daemonCPU()
	if err != nil {
		return 0, 0, err
	}
	commands := make([]*exec.Cmd, len(work.pods))
	for i, p := range work.pods {
		commands[i] = work.prepare(ctx, p)
	}
	begin := b.clock()
	err = b.runAtOnce(commands)
	took = b.clock().Sub(begin)
	if err != nil {
		return 0, 0, fmt.Errorf("%s %s: %w", filepath.Base(work.binary), work.command, err)
	}
	after, err := work.daemonCPU()
	cpu = after - before
	for _, c := range commands {
		cpu += c.ProcessState.UserTime() + c.ProcessState.SystemTime() // with the programs that it ran itself
	}
	return took, cpu, err
}

// runAtOnce runs all commands together. Each needs a thread of its own in the node's namespace.
func (b *bench) runAtOnce(commands []*exec.Cmd) error {
	errs := make([]error, len(commands))
	var all sync.WaitGroup
	for i, c := range commands {
		all.Go(func() {
			if err := b.node.Do(c.Run); err != nil {
				errs[i] = fmt.Errorf("%w: %s", err, c.Stdout)
			}
		})
	}
	all.Wait()
	return errors.Join(errs...)
}

// prepare makes the command for a pod, as a runtime calls a plugin.
func (w batch) prepare(ctx context.Context, p pod) *exec.Cmd {
	config := w.ipv4
	if w.dual {
		config = w.both
	}
	cmd := exec.CommandContext(ctx, w.binary) //nolint:gosec // one of the contenders
	cmd.Env = []string{
		"CNI_COMMAND=" + w.command, "CNI_CONTAINERID=" + p.id, "CNI_NETNS=" + p.netns, "CNI_IFNAME=eth0",
		"CNI_PATH=" + w.path, "CNI_ARGS=" + p.args,
	}
	cmd.Stdin, cmd.Stdout = bytes.NewReader(config), &bytes.Buffer{}
	return cmd
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
