package main

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"sync"
	"text/tabwriter"
	"time"

	"github.com/warren-cni/warren/pkg/lab"
)

// How long a probe may take. One that must get through has time for two repetitions of a lost packet; one that must not
// is given up after the first. While a change is waited for, probes come again and again, so that each can be short.
const (
	patienceOpen   = 5 * time.Second
	patienceClosed = 1300 * time.Millisecond
	patienceChange = 250 * time.Millisecond
)

// The rows of the table that are no tiers.
const (
	ownNode   = "own node"
	otherNode = "other node"
)

// attempt is one connection that is tried.
type attempt struct {
	from, to string // the row and the column of the table
	what     string // for a person who looks for what went wrong
	nodes    [2]*lab.Node
	address  netip.AddrPort
	expected bool
	probe    func(ctx context.Context, to netip.AddrPort) error
	seen     bool
}

// patience is how long the attempt may take.
func (a attempt) patience() time.Duration {
	if a.expected {
		return patienceOpen
	}
	return patienceClosed
}

// try tries all connections at once and notes which got through.
func try(ctx context.Context, attempts []attempt, patience func(attempt) time.Duration) {
	var group sync.WaitGroup
	for i := range attempts {
		group.Go(func() {
			a := &attempts[i]
			within, cancel := context.WithTimeout(ctx, patience(*a))
			defer cancel()
			a.seen = a.probe(within, a.address) == nil
		})
	}
	group.Wait()
}

// cell is one field of the table.
type cell struct {
	tried, expected, seen int
}

// String prints what is expected and what was seen.
func (c cell) String() string {
	expected := "no"
	if c.expected > 0 {
		expected = "yes"
	}
	text := fmt.Sprintf("%s: %d of %d", expected, c.seen, c.tried)
	if c.seen != c.expected {
		text += " WRONG"
	}
	return text
}

// table prints who reaches whom, and returns the attempts that were not as expected. An attempt that was expected to
// fail and one that was expected to succeed do not outweigh each other: each counts.
func table(out io.Writer, rows, columns []string, attempts []attempt) ([]attempt, error) {
	cells := map[[2]string]cell{}
	var wrong []attempt
	for _, a := range attempts {
		c := cells[[2]string{a.from, a.to}]
		c.tried++
		if a.expected {
			c.expected++
		}
		if a.seen {
			c.seen++
		}
		cells[[2]string{a.from, a.to}] = c
		if a.seen != a.expected {
			wrong = append(wrong, a)
		}
	}
	t := tabwriter.NewWriter(out, 0, 4, 4, ' ', 0)
	fmt.Fprintf(t, "   FROM\tTO %s\n", strings.Join(columns, "\tTO "))
	for _, row := range rows {
		fmt.Fprintf(t, "   %s", row)
		for _, column := range columns {
			fmt.Fprintf(t, "\t%s", cells[[2]string{row, column}])
		}
		fmt.Fprintln(t)
	}
	return wrong, t.Flush()
}
