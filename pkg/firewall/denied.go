package firewall

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// InClear begins the comments of rules that count what leaves the node unencrypted, as it is meant to.
const InClear = "in clear: "

// Denial counts what the DROP rules of one chain that have the same comment have dropped, or those that count what leaves InClear
// have seen.
type Denial struct {
	Family netfilter.Family
	Table  string
	Chain  string
	// Comment is the rule's, as in netfilter.Rule.
	Comment        string
	Packets, Bytes uint64
}

// denialsLast is for how long Denied gives the same answer where there is a clock: it reads all the rules back.
const denialsLast = 5 * time.Second

// Denied returns what the rules of ours have dropped or counted, up to five seconds ago, by table and chain as they stand. The numbers only
// grow while a chain stands, also when it is written anew; what was dropped between the last reading and a rewrite is lost. Any
// goroutine may call it.
func (w *Firewall) Denied(ctx context.Context) ([]Denial, error) {
	w.denials.Lock()
	defer w.denials.Unlock()
	if w.now == nil {
		return w.readDenials(ctx)
	}
	now := w.now()
	if w.denials.answer != nil && now.Sub(w.denials.at) < denialsLast {
		return w.denials.answer, nil
	}
	answer, err := w.readDenials(ctx)
	w.denials.answer, w.denials.at = answer, now
	return answer, err
}

// readDenials reads the counters of both families.
func (w *Firewall) readDenials(ctx context.Context) ([]Denial, error) {
	var read []Denial
	for _, f := range netfilter.Families {
		for _, table := range [...]string{"raw", "mangle", "filter"} { // nat drops nothing
			saved, err := w.tools[f].run(ctx, "", w.tools[f].save, "-c", "-t", table)
			if err != nil {
				return nil, fmt.Errorf("reading the counters of %s: %w", place{f, table}, err)
			}
			read = append(read, parseDenials(place{f, table}, saved)...)
		}
	}
	return w.denials.add(read), nil
}

// parseDenials reads the output of iptables-save -c.
func parseDenials(p place, saved string) []Denial {
	var all []Denial
	for line := range strings.Lines(saved) {
		counters, rule, ok := strings.Cut(strings.TrimSpace(line), " -A ")
		if !ok || !ours(rule) || jumpTarget(rule) != "DROP" && !strings.Contains(rule, " "+InClear) {
			continue
		}
		packets, bytes, _ := strings.Cut(strings.Trim(counters, "[]"), ":")
		d := Denial{Family: p.family, Table: p.table, Packets: number(packets), Bytes: number(bytes)}
		fields := words(rule)
		d.Chain = strings.Clone(fields[0])
		if i := slices.Index(fields, "--comment"); i >= 0 && i+1 < len(fields) {
			_, d.Comment, _ = strings.Cut(fields[i+1], " ") // behind the hash
		}
		all = append(all, d)
	}
	return all
}

// number reads a counter, which iptables-save always writes as a number.
func number(s string) uint64 {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0
	}
	return n
}

// denials adds up counters that begin again at zero when their chain is written anew.
type denials struct {
	sync.Mutex
	// last are the counters as they were read, total what is made of them. Both have no numbers in their keys.
	last, total map[Denial]Denial
	// answer is what Denied returned last, and at when; nil after an error.
	answer []Denial
	at     time.Time
}

// add takes a reading and returns the totals in the order of the reading. What is no longer read is forgotten.
func (d *denials) add(read []Denial) []Denial {
	var order []Denial
	last, total := map[Denial]Denial{}, map[Denial]Denial{}
	for _, r := range read {
		k := r.key()
		if _, again := last[k]; !again {
			order = append(order, k)
		}
		last[k] = r.plus(last[k])
	}
	for i, k := range order {
		now, before := last[k], d.last[k]
		grown := now
		if now.Packets >= before.Packets && now.Bytes >= before.Bytes {
			grown.Packets -= before.Packets
			grown.Bytes -= before.Bytes
		}
		total[k] = grown.plus(d.total[k])
		order[i] = total[k]
	}
	d.last, d.total = last, total
	return order
}

// key is the denial without its numbers.
func (d Denial) key() Denial {
	d.Packets, d.Bytes = 0, 0
	return d
}

// plus adds the numbers of another.
func (d Denial) plus(o Denial) Denial {
	d.Packets += o.Packets
	d.Bytes += o.Bytes
	return d
}
