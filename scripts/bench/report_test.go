package main

import (
	"maps"
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		in   []float64
		want float64
	}{{[]float64{5}, 5}, {[]float64{9, 1, 100}, 9}, {[]float64{4, 100, 1, 2}, 3}} {
		if got := median(tt.in); got != tt.want {
			t.Errorf("median of %v is %v, want %v", tt.in, got, tt.want)
		}
	}
}

func TestTally(t *testing.T) {
	of := tally{took: [contenders][]float64{{5, 6, 50}, {10, 12, 200}}, cpu: [contenders][]float64{{2, 2, 3}, {5, 5, 5}}}
	got := of.line("x ADD", 0.4)
	if got.Value != 0.5 || got.Met || got.Rounds != 3 || got.Details["ms"] != 6 || got.Details["peer-cpu-ms"] != 5 {
		t.Errorf("it sums up to %+v", got)
	}
}

func TestReport(t *testing.T) {
	lines := []line{
		line{
			Benchmark: "links", Figure: "x ADD", Value: 0.5, Target: 0.45, Rounds: 3,
			Details: map[string]float64{"ms": 6, "peer-ms": 12.06}, beside: []string{"ms", "peer-ms"},
		}.hold(),
		line{Benchmark: "datapath", Figure: "x stream", Value: 0.9312, Target: 0.92, AtLeast: true, Rounds: 1}.hold(),
	}
	var table, out strings.Builder
	if err := writeTable(&table, lines); err != nil {
		t.Fatal(err)
	}
	if err := writeLines(&out, lines); err != nil {
		t.Fatal(err)
	}
	wantTable := `BENCHMARK   FIGURE     MEASURED   TARGET          MET   BESIDE
links       x ADD      0.5        at most 0.45    NO    ms 6, peer-ms 12.1
datapath    x stream   0.931      at least 0.92   yes   
`
	if table.String() != wantTable {
		t.Errorf("table:\n%s\nwant:\n%s", table.String(), wantTable)
	}
	wantLines := `{"benchmark":"links","figure":"x ADD","value":0.5,"target":0.45,"met":false,"rounds":3,"details":{"ms":6,"peer-ms":12.06}}
{"benchmark":"datapath","figure":"x stream","value":0.9312,"target":0.92,"atLeast":true,"met":true,"rounds":1}
`
	if out.String() != wantLines {
		t.Errorf("lines:\n%s\nwant:\n%s", out.String(), wantLines)
	}
}

func TestSuite(t *testing.T) {
	text := `goos: linux
cpu: AMD EPYC
BenchmarkFlip/pods=10-2         	   20000	      1500  cpu-ns/op	         4.000 members/op	       0 B/op
BenchmarkFlip/pods=100-2        	   20000	      %s  cpu-ns/op
PASS
`
	s := suite{figures: []figure{
		{text: "us", of: sample{"Flip/pods=10", nanoseconds}, scale: toMicroseconds, most: 5},
		{text: "x", of: sample{"Flip/pods=100", nanoseconds}, by: sample{"Flip/pods=10", nanoseconds}, most: 1.2},
	}}
	var runs []values
	for _, nanos := range []string{"1500", "3000", "9000"} {
		run, err := parse(strings.Replace(text, "%s", nanos, 1))
		if err != nil {
			t.Fatal(err)
		}
		runs = append(runs, run)
	}
	lines, err := s.lines(runs)
	if err != nil {
		t.Fatal(err)
	}
	if lines[0].Value != 1.5 || !lines[0].Met || lines[1].Value != 2 || lines[1].Met {
		t.Errorf("values %v and %v, want 1.5 and 2", lines[0], lines[1])
	}
	if want := map[string]float64{"cpu-ns/op": 1500, "members/op": 4, "B/op": 0}; !maps.Equal(lines[0].Details, want) {
		t.Errorf("details %v, want %v", lines[0].Details, want)
	}
	s.figures[0].of.benchmark = "Flip"
	if _, err = s.lines(runs); err == nil {
		t.Error("a figure that no benchmark reports is no error")
	}
}

func TestChoose(t *testing.T) {
	chosen, err := choose(groups(), "links,compile")
	if err != nil || len(chosen) != 2 || chosen[0].name != "links" || chosen[1].name != "compile" {
		t.Errorf("chose %v, error %v", chosen, err)
	}
	if _, err = choose(groups(), "link"); err == nil {
		t.Error("a name that there is not is no error")
	}
}
