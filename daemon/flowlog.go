package main

import (
	"context"
	"encoding/json"
	"io"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nflog"
)

// How many lines there are in a second, and at once. Each rule that logs has a limit of its own in the kernel.
const (
	flowLines = 100
	flowBurst = 200
)

// flowQueue is how many packets wait for their lines to be written.
const flowQueue = 1024

// How long it takes until lines that were left out are told, and until the kernel's log is opened again.
const (
	flowTellAfter = time.Second
	flowRetry     = 5 * time.Second
)

// The verdicts.
const (
	flowDenied  = "denied"
	flowAllowed = "allowed"
)

// deniedEvery is how often a pod gets an Event about the same peer.
const deniedEvery = 5 * time.Minute

// flowLog tells of the packets that policies ask to log: a line of JSON for each, and an Event on the pod that was denied
// something. Whoever reads the lines too slowly misses some, and nothing waits.
type flowLog struct {
	node    string
	planner flowPlanner
	event   func(context.Context, kube.Event)
	out     io.Writer
	clock   func() time.Time

	packets chan nflog.Packet
	limit   *rate.Limiter
	events  seldom
	// lines and suppressed count the packets that got their lines, and those that did not.
	lines, suppressed atomic.Uint64

	mu      sync.Mutex
	problem []cluster.Problem
}

// flowPlanner knows what packets are about.
type flowPlanner interface {
	pod(netip.Addr) (*cluster.Pod, bool)
	group(chain string) (direction string, policies []string, ok bool)
}

// flow is a line of the log.
type flow struct {
	Time        time.Time `json:"time"`
	Verdict     string    `json:"verdict"`
	Direction   string    `json:"direction,omitempty"`
	Protocol    string    `json:"protocol"`
	Source      flowEnd   `json:"source"`
	Destination flowEnd   `json:"destination"`
	// Policies are those that isolate the pod in the direction, one of which allows the connection or none.
	Policies []string `json:"policies,omitempty"`
	Node     string   `json:"node"`
	Chain    string   `json:"chain"`
}

// flowEnd is one end of a connection.
type flowEnd struct {
	Address netip.Addr `json:"address"`
	Port    uint16     `json:"port,omitempty"`
	Pod     string     `json:"pod,omitempty"`
	Node    string     `json:"node,omitempty"`

	pod *cluster.Pod
}

// flowGap is a line about packets that got none.
type flowGap struct {
	Time       time.Time `json:"time"`
	Suppressed uint64    `json:"suppressed"`
	Node       string    `json:"node"`
}

func newFlowLog(node string, p flowPlanner, event func(context.Context, kube.Event), out io.Writer, clock func() time.Time) *flowLog {
	return &flowLog{
		node: node, planner: p, event: event, out: out, clock: clock,
		packets: make(chan nflog.Packet, flowQueue), limit: rate.NewLimiter(flowLines, flowBurst), events: seldom{every: deniedEvery},
	}
}

// run reads and writes until the context ends.
func (f *flowLog) run(ctx context.Context) {
	go f.write(ctx) // not waited for: it may hang in a pipe that nobody reads
	for {
		if err := f.read(ctx); ctx.Err() == nil {
			f.setProblem(err)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(flowRetry):
		}
	}
}

// read reads the kernel's log until the context ends or that fails.
func (f *flowLog) read(ctx context.Context) error {
	reader, err := nflog.Open(netfilter.LogGroup)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, reader.Close)
	defer func() {
		if stop() {
			reader.Close()
		}
	}()
	f.setProblem(nil)
	for {
		packets, lost, err := reader.Read()
		if err != nil {
			return err
		}
		f.suppressed.Add(uint64(lost))
		for _, p := range packets {
			select {
			case f.packets <- p:
			default:
				f.suppressed.Add(1)
			}
		}
	}
}

func (f *flowLog) setProblem(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.problem = nil
	if err != nil {
		f.problem = []cluster.Problem{applyProblem("PacketLogUnreadable", "Node "+f.node, err,
			"stop the other reader; policies are enforced, but what they ask to log is not logged, and denied pods get no Events, until then")}
	}
}

// problems are those of reading the kernel's log.
func (f *flowLog) problems() []cluster.Problem {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.problem
}

// write writes the lines of the packets that were read, until the context ends.
func (f *flowLog) write(ctx context.Context) {
	lines := json.NewEncoder(f.out)
	var told uint64
	var tell <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return
		case p := <-f.packets:
			f.writeOne(ctx, lines, p)
		case <-tell:
			n := f.suppressed.Load()
			_ = lines.Encode(flowGap{Time: f.clock().UTC(), Suppressed: n - told, Node: f.node}) // there is no other place to tell it
			told, tell = n, nil
		}
		if tell == nil && f.suppressed.Load() > told {
			tell = time.After(flowTellAfter)
		}
	}
}

// writeOne writes the line of a packet, and the Event.
func (f *flowLog) writeOne(ctx context.Context, lines *json.Encoder, p nflog.Packet) {
	one, ok := f.describe(p)
	if !ok {
		return
	}
	if event, key, about := one.deniedEvent(); about && f.events.due(key, f.clock()) {
		f.event(ctx, event)
	}
	if !f.limit.AllowN(f.clock(), 1) || lines.Encode(one) != nil {
		f.suppressed.Add(1)
		return
	}
	f.lines.Add(1)
}

// describe says what a packet is about; it returns false for a packet that no rule of ours has logged.
func (f *flowLog) describe(p nflog.Packet) (flow, bool) {
	verdict, chain, ok := strings.Cut(p.Prefix, ":")
	switch {
	case !ok || !p.Source.IsValid():
		return flow{}, false
	case verdict == "D":
		verdict = flowDenied
	case verdict == "A":
		verdict = flowAllowed
	default:
		return flow{}, false
	}
	one := flow{
		Time: f.clock().UTC(), Verdict: verdict, Protocol: protocolText(p.Protocol), Node: f.node, Chain: chain,
		Source: f.end(p.Source), Destination: f.end(p.Destination),
	}
	one.Direction, one.Policies, _ = f.planner.group(chain) // a chain that is gone by now is still the one that decided
	return one, true
}

// end says who is at one end of a connection.
func (f *flowLog) end(at netip.AddrPort) flowEnd {
	end := flowEnd{Address: at.Addr(), Port: at.Port()}
	if pod, ok := f.planner.pod(at.Addr()); ok {
		end.Pod, end.Node, end.pod = pod.Key().String(), pod.Node, pod
	}
	return end
}

// String names the end for people.
func (e flowEnd) String() string {
	if e.Pod != "" {
		return e.Pod
	}
	return e.Address.String()
}

// protocolText names a protocol as policies do, or numbers it.
func protocolText(number uint8) string {
	switch number {
	case unix.IPPROTO_TCP:
		return "TCP"
	case unix.IPPROTO_UDP:
		return "UDP"
	case unix.IPPROTO_SCTP:
		return "SCTP"
	case unix.IPPROTO_ICMP:
		return "ICMP"
	case unix.IPPROTO_ICMPV6:
		return "ICMPv6"
	default:
		return strconv.Itoa(int(number))
	}
}
