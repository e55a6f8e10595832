package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
)

// line is one line of the report: a figure, and the target that it is held against.
type line struct {
	Benchmark string  `json:"benchmark"`
	Figure    string  `json:"figure"`
	Value     float64 `json:"value"`
	// Target is the most that the value may be, or the least where AtLeast is set.
	Target  float64 `json:"target"`
	AtLeast bool    `json:"atLeast,omitempty"`
	Met     bool    `json:"met"`
	// Rounds is how many there were. What is measured again in each counts by its median.
	Rounds int `json:"rounds"`
	// Details are what the value was worked out from, and what else was measured with it.
	Details map[string]float64 `json:"details,omitempty"`
	// beside names those of the details that people want to see.
	beside []string
}

// hold holds the value against the target.
func (l line) hold() line {
	l.Met = l.Value <= l.Target
	if l.AtLeast {
		l.Met = l.Value >= l.Target
	}
	return l
}

// target returns the target in words.
func (l line) target() string {
	if l.AtLeast {
		return fmt.Sprintf("at least %.4g", l.Target)
	}
	return fmt.Sprintf("at most %.4g", l.Target)
}

// asides returns the details for people.
func (l line) asides() string {
	var words []string
	for _, name := range l.beside {
		words = append(words, fmt.Sprintf("%s %.3g", name, l.Details[name]))
	}
	return strings.Join(words, ", ")
}

// median returns the middle one, or the mean of the two in the middle.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	return (sorted[(n-1)/2] + sorted[n/2]) / 2
}

// writeTable writes the lines for people.
func writeTable(out io.Writer, lines []line) error {
	w := tabwriter.NewWriter(out, 0, 0, 3, ' ', 0)
	fmt.Fprintln(w, "BENCHMARK\tFIGURE\tMEASURED\tTARGET\tMET\tBESIDE")
	for _, l := range lines {
		met := "yes"
		if !l.Met {
			met = "NO"
		}
		fmt.Fprintf(w, "%s\t%s\t%.3g\t%s\t%s\t%s\n", l.Benchmark, l.Figure, l.Value, l.target(), met, l.asides())
	}
	if err := w.Flush(); err != nil {
		return fmt.Errorf("writing the table: %w", err)
	}
	return nil
}

// writeLines writes the lines for programs.
func writeLines(out io.Writer, lines []line) error {
	encoder := json.NewEncoder(out)
	for _, l := range lines {
		if err := encoder.Encode(l); err != nil {
			return fmt.Errorf("writing the results: %w", err)
		}
	}
	return nil
}
