package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"
)

// series is what one contender needed for one benchmark.
type series struct {
	// rounds are the times of one operation, one for each round.
	rounds []time.Duration
	// cpu is the processor time of all operations, of every process that took part.
	cpu        time.Duration
	operations int
}

// add adds a round.
func (s *series) add(took, cpu time.Duration, operations int) {
	s.rounds = append(s.rounds, took/time.Duration(operations))
	s.cpu += cpu
	s.operations += operations
}

// contenders is how many take part in a benchmark: Warren, then the peer.
const contenders = 2

// measurement is one benchmark.
type measurement struct {
	name, peer string
	series     [contenders]series
}

// result is a measurement as it is reported.
type result struct {
	Benchmark string `json:"benchmark"`
	Peer      string `json:"peer"`
	Rounds    int    `json:"rounds"`
	// WarrenMS and PeerMS are the median times of one operation. Ratio is the median of the rounds' ratios, so that what
	// slows a round down, and both contenders with it, does not count.
	WarrenMS float64 `json:"warrenMs"`
	PeerMS   float64 `json:"peerMs"`
	Ratio    float64 `json:"ratio"`
	// The processor time of one operation, on average.
	WarrenCPUMS float64 `json:"warrenCpuMs"`
	PeerCPUMS   float64 `json:"peerCpuMs"`
}

// result sums a measurement up.
func (m measurement) result() result {
	ours, theirs := m.series[0], m.series[1]
	ratios := make([]float64, len(ours.rounds))
	for i := range ratios {
		ratios[i] = float64(ours.rounds[i]) / float64(theirs.rounds[i])
	}
	return result{
		Benchmark: m.name, Peer: m.peer, Rounds: len(ours.rounds),
		WarrenMS: milliseconds(median(ours.rounds)), PeerMS: milliseconds(median(theirs.rounds)), Ratio: median(ratios),
		WarrenCPUMS: milliseconds(ours.cpu) / float64(ours.operations), PeerCPUMS: milliseconds(theirs.cpu) / float64(theirs.operations),
	}
}

// median returns the middle one, or the mean of the two in the middle.
func median[T time.Duration | float64](values []T) T {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// milliseconds converts to the unit of the report.
func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// writeTable writes the results for people.
func writeTable(out io.Writer, measured []measurement) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	_, err := fmt.Fprintln(w, "BENCHMARK\tWARREN\tPEER\tRATIO\tCPU WARREN\tCPU PEER\tAGAINST")
	for _, m := range measured {
		if err == nil {
			r := m.result()
			_, err = fmt.Fprintf(w, "%s\t%.2f ms\t%.2f ms\t%.2f\t%.2f ms\t%.2f ms\t%s\n",
				r.Benchmark, r.WarrenMS, r.PeerMS, r.Ratio, r.WarrenCPUMS, r.PeerCPUMS, r.Peer)
		}
	}
	if err != nil {
		return fmt.Errorf("writing the table: %w", err)
	}
	return w.Flush()
}

// writeLines writes the results for programs.
func writeLines(out io.Writer, measured []measurement) error {
	encoder := json.NewEncoder(out)
	for _, m := range measured {
		if err := encoder.Encode(m.result()); err != nil {
			return fmt.Errorf("writing the results: %w", err)
		}
	}
	return nil
}
