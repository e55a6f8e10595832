package main

import (
	"strings"
	"testing"
	"time"
)

// times returns durations in milliseconds.
func times(ms ...int) []time.Duration {
	var ds []time.Duration
	for _, n := range ms {
		ds = append(ds, time.Duration(n)*time.Millisecond)
	}
	return ds
}

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		in   []time.Duration
		want time.Duration
	}{
		{times(5), 5 * time.Millisecond},
		{times(9, 1, 100), 9 * time.Millisecond},
		{times(4, 100, 1, 2), 3 * time.Millisecond},
	} {
		if got := median(tt.in); got != tt.want {
			t.Errorf("median of %v is %v, want %v", tt.in, got, tt.want)
		}
	}
}

func TestReport(t *testing.T) {
	m := measurement{name: "ADD IPv4, one at a time", peer: "ptp + host-local"}
	for _, ms := range times(40, 48, 400) { // of eight operations
		m.series[0].add(ms, 16*time.Millisecond, 8)
		m.series[1].add(2*ms, 40*time.Millisecond, 8)
	}
	var table, lines strings.Builder
	if err := writeTable(&table, []measurement{m}); err != nil {
		t.Fatal(err)
	}
	if err := writeLines(&lines, []measurement{m, m}); err != nil {
		t.Fatal(err)
	}
	wantTable := `BENCHMARK                 WARREN    PEER       RATIO   CPU WARREN   CPU PEER   AGAINST
ADD IPv4, one at a time   6.00 ms   12.00 ms   0.50    2.00 ms      5.00 ms    ptp + host-local
`
	if table.String() != wantTable {
		t.Errorf("table:\n%s\nwant:\n%s", table.String(), wantTable)
	}
	wantLine := `{"benchmark":"ADD IPv4, one at a time","peer":"ptp + host-local","rounds":3,"warrenMs":6,"peerMs":12,"ratio":0.5,"warrenCpuMs":2,"peerCpuMs":5}
`
	if lines.String() != wantLine+wantLine {
		t.Errorf("lines:\n%s\nwant twice:\n%s", lines.String(), wantLine)
	}
}
