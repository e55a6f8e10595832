package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec" //nolint:depguard // the benchmarks of a package are a program
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
)

// suite is benchmarks of one package.
type suite struct {
	// pattern and benchtime are those of `go test`.
	dir, pattern, benchtime string
	// once is set where a run takes many rounds itself, and long to begin.
	once    bool
	figures []figure
}

// sample names one of the figures that `go test` reports.
type sample struct{ benchmark, unit string }

// figure is what a suite reports: one sample, or what it is of another one.
type figure struct {
	text  string
	of    sample
	by    sample
	scale float64
	// most or least is the target.
	most, least float64
	beside      []string
}

// values are what one run reported.
type values map[sample]float64

// run builds the package's benchmarks, runs them several times, and returns a line for each figure.
func (s suite) run(ctx context.Context, settings settings) ([]line, error) {
	program := filepath.Join(settings.binaries, "bench", filepath.Base(s.dir)+".test")
	build := exec.CommandContext(ctx, "go", "test", "-c", "-o", program, "./"+s.dir) //nolint:gosec // constants
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("building the benchmarks of %s: %w\n%s", s.dir, err, out)
	}
	rounds := settings.rounds
	if s.once {
		rounds = 1
	}
	var runs []values
	for range rounds {
		cmd := exec.CommandContext(ctx, program, "-test.run", "^$", "-test.bench", s.pattern, "-test.benchtime", s.benchtime) //nolint:gosec // constants
		var out strings.Builder
		cmd.Dir, cmd.Stdout, cmd.Stderr = s.dir, io.MultiWriter(&out, settings.progress), settings.progress
		if err := cmd.Run(); err != nil {
			return nil, fmt.Errorf("running the benchmarks of %s: %w", s.dir, err)
		}
		run, err := parse(out.String())
		if err != nil {
			return nil, fmt.Errorf("reading the results of %s: %w", s.dir, err)
		}
		runs = append(runs, run)
	}
	return s.lines(runs)
}

// parse reads what `go test -bench` writes.
func parse(text string) (values, error) {
	processors := regexp.MustCompile(`-\d+$`)
	found := values{}
	for textLine := range strings.Lines(text) {
		fields := strings.Fields(textLine)
		if len(fields) < 4 || len(fields)%2 != 0 || !strings.HasPrefix(fields[0], "Benchmark") {
			continue
		}
		name := strings.TrimPrefix(processors.ReplaceAllString(fields[0], ""), "Benchmark")
		for i := 2; i < len(fields); i += 2 {
			value, err := strconv.ParseFloat(fields[i], 64)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", name, err)
			}
			found[sample{name, fields[i+1]}] = value
		}
	}
	return found, nil
}

// lines returns a line for each figure.
func (s suite) lines(runs []values) ([]line, error) {
	var lines []line
	var errs []error
	for _, f := range s.figures {
		l := line{Figure: f.text, Target: f.most, Rounds: len(runs), Details: map[string]float64{}, beside: f.beside}
		if f.least > 0 {
			l.Target, l.AtLeast = f.least, true
		}
		var each []float64
		details := map[string][]float64{}
		for _, run := range runs {
			value, err := f.value(run)
			errs = append(errs, err)
			each = append(each, value)
			for name, v := range run {
				if name.benchmark == f.of.benchmark {
					details[name.unit] = append(details[name.unit], v)
				}
			}
		}
		l.Value = median(each)
		for unit, all := range details {
			l.Details[unit] = median(all)
		}
		lines = append(lines, l.hold())
	}
	return lines, errors.Join(errs...)
}

// value works the figure out from a run.
func (f figure) value(run values) (float64, error) {
	value, ok := run[f.of]
	by, divided := run[f.by]
	if !ok || f.by != (sample{}) && (!divided || by == 0) {
		return 0, fmt.Errorf("%q: no benchmark reported %v and %v", f.text, f.of, f.by)
	}
	if divided {
		value /= by
	}
	if f.scale != 0 {
		value *= f.scale
	}
	return value, nil
}
