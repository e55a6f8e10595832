package firewall

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/internal/measure"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// versus runs two ways to one end in turns, each first in every other round, since who comes second finds the kernel's memory warm. It
// reports what the first takes by what the second does: "x-bare" of the median times, "x-bare-cpu" of the processor's time, which
// others on the machine do not change.
func versus(b *testing.B, ours, bare func()) {
	b.Helper()
	var times [2][]time.Duration
	var used [2]time.Duration
	ways, round := [2]func(){ours, bare}, 0
	for b.Loop() {
		round++
		for turn := range ways {
			i := (round + turn) % len(ways)
			before, began := measure.CPU(), time.Now() //nolint:forbidigo // a measurement
			ways[i]()
			times[i] = append(times[i], time.Since(began))
			used[i] += measure.CPU() - before
		}
	}
	b.ReportMetric(float64(median(times[0]))/1e6, "ms/ours")
	b.ReportMetric(float64(median(times[1]))/1e6, "ms/bare")
	b.ReportMetric(float64(median(times[0]))/float64(median(times[1])), "x-bare")
	b.ReportMetric(float64(used[0])/float64(used[1]), "x-bare-cpu")
}

func median(times []time.Duration) time.Duration {
	slices.Sort(times)
	return times[len(times)/2]
}

// wide is the sample with many sets of five members more in IPv4.
func wide(sets int) netfilter.Ruleset {
	r := sample()
	for i := range sets {
		s := netfilter.Set{Name: netfilter.SetName(netfilter.IPv4, "P", fmt.Sprint(i)), Type: netfilter.HashIP}
		for j := range 5 {
			s.Entries = append(s.Entries, netfilter.Address(netip.AddrFrom4([4]byte{11, byte(i >> 8), byte(i), byte(j)})))
		}
		r.V4.Sets = append(r.V4.Sets, s)
	}
	return r
}

// BenchmarkSetApply changes members spread over 2000 sets, against messages made and sent by hand over one socket.
func BenchmarkSetApply(b *testing.B) {
	const sets = 2000
	for _, members := range []int{1, 100, 10_000} {
		b.Run(fmt.Sprintf("members=%d", members), func(b *testing.B) {
			w := onBench(b)
			r := wide(sets)
			mustApply(b, w, r)
			change, back := netfilter.Change{}, netfilter.Change{}
			for i := range members {
				s := &r.V4.Sets[len(r.V4.Sets)-sets+i%sets]
				if i < sets {
					plain := *s
					plain.Entries = nil
					change.V4.Sets = append(change.V4.Sets, netfilter.SetChange{Set: plain})
				}
				c := &change.V4.Sets[i%sets]
				c.Add = append(c.Add, netfilter.Address(netip.AddrFrom4([4]byte{12, 0, byte(i >> 8), byte(i)})))
			}
			for _, c := range change.V4.Sets {
				c.Add, c.Remove = nil, c.Add
				back.V4.Sets = append(back.V4.Sets, c)
			}
			hand := newByHand(b, change, back)
			turn := []netfilter.Change{change, back}
			versus(b, func() {
				for _, c := range turn {
					if changes, err := w.Patch(b.Context(), c); err != nil || changes != (Changes{SetOps: members}) {
						b.Fatalf("wrote %+v, error %v", changes, err)
					}
				}
			}, hand.send)
			if members == 1 {
				reportPackage(b, w, r.V4.Sets[len(r.V4.Sets)-sets].Name, turn)
			}
		})
	}
}

// reportPackage reports what a member that comes and goes takes by what it takes with netlink's own functions, over a socket that is kept,
// as "x-package".
func reportPackage(b *testing.B, w *Firewall, set string, turn []netfilter.Change) {
	b.Helper()
	handle, err := netlink.NewHandle(unix.NETLINK_NETFILTER)
	if err != nil {
		b.Fatal(err)
	}
	defer handle.Close()
	member := &netlink.IPSetEntry{IP: net.IPv4(12, 0, 0, 0), CIDR: 32}
	var times [2][]time.Duration
	for range 2000 {
		began := time.Now() //nolint:forbidigo // a measurement
		for _, c := range turn {
			if _, err := w.Patch(b.Context(), c); err != nil {
				b.Fatal(err)
			}
		}
		times[0] = append(times[0], time.Since(began))
		began = time.Now() //nolint:forbidigo // a measurement
		if err := errors.Join(handle.IpsetAdd(set, member), handle.IpsetDel(set, member)); err != nil {
			b.Fatal(err)
		}
		times[1] = append(times[1], time.Since(began))
	}
	b.ReportMetric(float64(median(times[0]))/float64(median(times[1])), "x-package")
}

// byHand makes one message of each set's changes, sends it and reads its answer, over one socket.
type byHand struct {
	b *testing.B
	*socket
	answer [4096]byte
	sets   []netfilter.SetChange
}

func newByHand(b *testing.B, changes ...netfilter.Change) *byHand {
	b.Helper()
	s, err := openSocket()
	if err != nil {
		b.Fatal(err)
	}
	h := &byHand{b: b, socket: s}
	for _, c := range changes {
		h.sets = append(h.sets, c.V4.Sets...)
	}
	return h
}

func (h *byHand) send() {
	for i := range h.sets {
		s := &h.sets[i]
		cmd, members := nl.IPSET_CMD_ADD, s.Add
		if len(s.Remove) > 0 {
			cmd, members = nl.IPSET_CMD_DEL, s.Remove
		}
		kernelSets{h.socket}.begin(cmd, unix.NLM_F_ACK)
		if err := h.appendMembers(s.Name, s.Type, members); err != nil {
			h.b.Fatal(err)
		}
		h.end()
		if _, err := unix.Write(h.kernel.FD(), h.messages); err != nil {
			h.b.Fatal(err)
		}
		h.discard()
		n, err := unix.Read(h.kernel.FD(), h.answer[:])
		if err != nil || n < 20 || [4]byte(h.answer[16:20]) != [4]byte{} {
			h.b.Fatalf("answer %x, error %v", h.answer[:n], err)
		}
	}
}

// large is the sample with so many rules more, 20 a chain, in IPv4.
func large(rules int) netfilter.Ruleset {
	r := sample()
	for i := range rules / 20 {
		c := netfilter.Chain{Table: "mangle", Name: netfilter.Name("I", fmt.Sprint(i)), Closable: []string{"shop/api"}}
		for port := range 20 {
			c.Rules = append(c.Rules, rule("shop/api ingress", fmt.Sprintf("-p tcp --dport %d -j RETURN", port+1)))
		}
		r.V4.Chains = append(r.V4.Chains, c)
	}
	return r
}

// BenchmarkRuleApply changes one chain of many rules, against iptables-restore --noflush of the same bytes by hand.
func BenchmarkRuleApply(b *testing.B) {
	for _, rules := range []int{1000, 5000, 20_000} {
		b.Run(fmt.Sprintf("rules=%d", rules), func(b *testing.B) {
			w := onBench(b)
			r := large(rules)
			mustApply(b, w, r)
			c := r.V4.Chains[len(r.V4.Chains)-1]
			last, i := c.Rules[19], 0
			next := func() netfilter.Chain {
				i++
				c.Rules = append(slices.Clone(c.Rules[:19]), netfilter.Rule{Args: last.Args, Comment: fmt.Sprint(i % 10)})
				return c
			}
			versus(b, func() {
				change := netfilter.Change{V4: netfilter.RulesChange{Write: []netfilter.Chain{next()}}}
				if changes, err := w.Patch(b.Context(), change); err != nil || changes.Execs != 1 {
					b.Fatalf("wrote %+v, error %v", changes, err)
				}
			}, func() {
				t := w.tools[netfilter.IPv4]
				text := netfilter.Delta{Table: "mangle", Write: []netfilter.Chain{next()}}.Render()
				if _, words, err := t.exec.Run(b.Context(), text, t.restore, "--noflush", "-w", "10"); err != nil {
					b.Fatal(err, words)
				}
			})
		})
	}
}

// BenchmarkRewriteAll is the change of one chain, against saving and restoring everything at each event.
func BenchmarkRewriteAll(b *testing.B) {
	w := onBench(b)
	r := large(20_000)
	mustApply(b, w, r)
	c := r.V4.Chains[len(r.V4.Chains)-1]
	i := 0
	versus(b, func() {
		i++
		c.Rules = append(slices.Clone(c.Rules[:19]), rule(fmt.Sprint(i), "-j DROP"))
		if _, err := w.Patch(b.Context(), netfilter.Change{V4: netfilter.RulesChange{Write: []netfilter.Chain{c}}}); err != nil {
			b.Fatal(err)
		}
	}, func() {
		for _, f := range netfilter.Families {
			t := w.tools[f]
			saved, _, err := t.exec.Run(b.Context(), "", t.save)
			if err != nil {
				b.Fatal(err)
			}
			if _, words, err := t.exec.Run(b.Context(), saved, t.restore); err != nil {
				b.Fatal(err, words)
			}
		}
	})
}

// BenchmarkAdopt is the first apply of a daemon that starts where everything stands, and what each audit costs, against the programs
// that only write out what stands.
func BenchmarkAdopt(b *testing.B) {
	w := onBench(b)
	r := large(20_000)
	for i := range 20 {
		s := netfilter.Set{Name: netfilter.SetName(netfilter.IPv4, "P", fmt.Sprint(i)), Type: netfilter.HashIP}
		for j := range 10_000 {
			s.Entries = append(s.Entries, netfilter.Address(netip.AddrFrom4([4]byte{11, byte(i), byte(j >> 8), byte(j)})))
		}
		r.V4.Sets = append(r.V4.Sets, s)
	}
	mustApply(b, w, r)
	versus(b, func() {
		w.Forget()
		if changes := mustApply(b, w, r); changes != (Changes{}) {
			b.Fatalf("wrote %+v", changes)
		}
	}, func() {
		for _, f := range netfilter.Families {
			for _, p := range places(f) {
				if _, words, err := w.tools[f].exec.Run(b.Context(), "", w.tools[f].save, "-t", p.table); err != nil {
					b.Fatal(err, words)
				}
			}
		}
		if out, words, err := (programs{}).Run(b.Context(), "", "ipset", "save"); err != nil || strings.Count(out, "\n") < 200_000 {
			b.Fatal(err, words)
		}
	})
}

func onBench(b *testing.B) *Firewall {
	b.Helper()
	w, err := New(b.Context(), newNode(b, nft).options())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(w.Close)
	return w
}

func mustApply(b *testing.B, w *Firewall, r netfilter.Ruleset) Changes {
	b.Helper()
	changes, err := w.Apply(b.Context(), r)
	if err != nil {
		b.Fatal(err)
	}
	return changes
}
