package bench

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/internal/measure"
	"github.com/warren-cni/warren/pkg/lab"
)

// flows is how many streams there are at most.
const flows = 4

// turn is how long one way has its turn to send, and tripTurn how long to go to and fro.
const (
	turn     = 500 * time.Millisecond
	tripTurn = 200 * time.Millisecond
)

// The contestants.
const (
	bare    = iota
	tracked // stateful
	ours
	contestants
)

// way is one of the ways from node to node that are compared: ours, or WireGuard by hand.
type way struct {
	client, server ns.NetNS
	to             netip.Addr
	// processes are those whose processor time counts.
	processes []int
	listeners []io.Closer
	streams   []net.Conn
	echo      net.Conn
	arrived   atomic.Int64
}

// BenchmarkEncryption sends traffic from node to node through our tunnels and through the same WireGuard that is configured by
// hand and has nothing else on its nodes, in turns. It reports medians of ours by theirs: what gets through ("x-stream"), the
// processor time of the tunnels, and of our daemons, for the same bytes ("x-cpu"), and the time of a round trip ("x-trip"). In
// "x-whole-cpu" is also the time of those who send and receive, and with it what the kernel does for them between a pod and the tunnel.
//
// A third contestant is WireGuard by hand once more, on nodes that ask of their kernel what enforcing policies takes whoever writes the
// rules (see stateful). What it costs by the bare one ("stateful-x-stream" and so on) is the share that lies below our code.
func BenchmarkEncryption(b *testing.B) {
	for _, size := range []struct {
		name        string
		uplink, mtu int
	}{{"auto", 1500, 0}, {"1420", 1500, 1420}, {"8920", 9000, 8920}} {
		b.Run("mtu="+size.name, func(b *testing.B) {
			all := [contestants]map[string]*way{
				bare:    newBare(b, "encbare", size.uplink, size.mtu, ""),
				tracked: newBare(b, "encstate", size.uplink, size.mtu, stateful),
				ours:    newOurs(b, size.uplink, size.mtu),
			}
			for _, path := range []string{"pods", "nodes"} {
				for _, n := range []int{1, flows} {
					b.Run(fmt.Sprintf("%s/flows=%d", path, n), func(b *testing.B) {
						compareWays(b, n, [contestants]*way{bare: all[bare][path], tracked: all[tracked][path], ours: all[ours][path]})
					})
				}
			}
		})
	}
}

// newOurs makes two nodes of Warren's, and returns the ways between their pods and between the nodes.
func newOurs(b *testing.B, uplink, mtu int) map[string]*way {
	b.Helper()
	s := newStageOf(b, lab.Options{Name: "encours", Nodes: 2, WireGuard: "userspace", UplinkMTUs: []int{uplink}})
	s.start(func(*lab.Node) []string { return []string{"--mtu", strconv.Itoa(mtu)} })
	client, server := s.pod(0, "client", "client"), s.pod(1, "server", "server")
	var processes []int
	for i, tunnel := range s.tunnels {
		child, err := tunnel.Child(b.Context())
		if err != nil {
			b.Fatal(err)
		}
		processes = append(processes, child, tunnel.PID(), s.daemons[i].PID())
	}
	return map[string]*way{
		"pods":  newWay(b, &way{client: client.Netns(), server: server.Netns(), to: server.Addresses[0], processes: processes}),
		"nodes": newWay(b, &way{client: s.Nodes[0].Netns(), server: s.Nodes[1].Netns(), to: s.Nodes[1].PodCIDRs[0].Addr().Next(), processes: processes}),
	}
}

// newWay starts the servers of a way, and connects the client to them.
func newWay(b *testing.B, w *way) *way {
	b.Helper()
	b.Cleanup(func() {
		for _, c := range w.listeners {
			_ = c.Close()
		}
		for _, c := range w.streams {
			_ = c.Close()
		}
		if w.echo != nil {
			_ = w.echo.Close()
		}
	})
	if err := w.server.Do(func(ns.NetNS) error { return w.serve() }); err != nil {
		b.Fatal(err)
	}
	err := w.client.Do(func(ns.NetNS) (err error) {
		dialer := net.Dialer{Timeout: patience}
		for range flows {
			stream, err := dialer.DialContext(b.Context(), "tcp4", netip.AddrPortFrom(w.to, streamPort).String())
			if err != nil {
				return err
			}
			w.streams = append(w.streams, stream)
		}
		w.echo, err = dialer.DialContext(b.Context(), "tcp4", netip.AddrPortFrom(w.to, requestPort).String())
		return err
	})
	if err != nil {
		b.Fatal(err)
	}
	return w
}

// serve starts the servers in the network namespace of the calling thread.
func (w *way) serve() error {
	for port, answer := range map[int]func(net.Conn){streamPort: w.swallow, requestPort: echo} {
		listener, err := net.ListenTCP("tcp4", &net.TCPAddr{Port: port})
		if err != nil {
			return err
		}
		w.listeners = append(w.listeners, listener)
		go func() {
			for {
				connection, err := listener.Accept()
				if err != nil {
					return
				}
				go answer(connection)
			}
		}()
	}
	return nil
}

// swallow counts what arrives.
func (w *way) swallow(c net.Conn) {
	var err error
	for buffer := make([]byte, 1<<18); err == nil; {
		var n int
		n, err = c.Read(buffer)
		w.arrived.Add(int64(n))
	}
	_ = c.Close()
}

// echo sends back what arrives.
func echo(c net.Conn) {
	_, _ = io.Copy(c, c)
	_ = c.Close()
}

// measured is what a way did in its turn.
type measured struct{ bytesPerSecond, cpuPerByte, wholeCPUPerByte, trip float64 }

// run sends by a number of streams for one turn, and then goes to and fro for another.
func (w *way) run(b *testing.B, n int) (measured, error) {
	b.Helper()
	used, err := cpuOf(w.processes)
	if err != nil {
		return measured{}, err
	}
	before, usedHere, began := w.arrived.Load(), measure.CPU(), time.Now() //nolint:forbidigo // a measurement
	errs := make([]error, n)
	var group sync.WaitGroup
	for i := range n {
		group.Go(func() { errs[i] = write(w.streams[i], make([]byte, 1<<17), turn) })
	}
	group.Wait()
	bytes, took, here := float64(w.arrived.Load()-before), time.Since(began), measure.CPU()-usedHere
	now, err := cpuOf(w.processes)
	if err = errors.Join(append(errs, err)...); err != nil {
		return measured{}, err
	}
	trip, err := w.trip()
	return measured{
		bytesPerSecond: bytes / took.Seconds(), trip: trip,
		cpuPerByte: (now - used).Seconds() / bytes, wholeCPUPerByte: (now - used + here).Seconds() / bytes,
	}, err
}

// trip returns the seconds of one round trip.
func (w *way) trip() (float64, error) {
	var trips int
	message := make([]byte, 64)
	began := time.Now()                                               //nolint:forbidigo // a measurement
	for end := began.Add(tripTurn); time.Now().Before(end); trips++ { //nolint:forbidigo // the same
		if _, err := w.echo.Write(message); err != nil {
			return 0, err
		}
		if _, err := io.ReadFull(w.echo, message); err != nil {
			return 0, err
		}
	}
	return time.Since(began).Seconds() / float64(trips), nil
}

// cpuOf returns the processor time that processes have used, in hundredths of a second as the kernel tells it.
func cpuOf(processes []int) (time.Duration, error) {
	var ticks int64
	for _, process := range processes {
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", process))
		if err != nil {
			return 0, err
		}
		// The name, in parentheses, may hold anything; after it come the state and the other fields.
		fields := strings.Fields(string(text[strings.LastIndexByte(string(text), ')')+1:]))
		for _, field := range fields[11:13] {
			n, err := strconv.ParseInt(field, 10, 64)
			if err != nil {
				return 0, err
			}
			ticks += n
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond, nil
}

// compareWays lets the ways take turns, in every round another one first, and reports the medians of each by the bare one.
func compareWays(b *testing.B, flows int, ways [contestants]*way) {
	b.Helper()
	var got [contestants][]measured
	for round := 0; b.Loop(); round++ {
		for i := range ways {
			at := (i + round) % len(ways)
			one, err := ways[at].run(b, flows)
			if err != nil {
				b.Fatal(err)
			}
			got[at] = append(got[at], one)
		}
	}
	for _, figure := range []struct {
		unit string
		of   func(measured) float64
	}{
		{"x-stream", func(m measured) float64 { return m.bytesPerSecond }},
		{"x-cpu", func(m measured) float64 { return m.cpuPerByte }},
		{"x-whole-cpu", func(m measured) float64 { return m.wholeCPUPerByte }},
		{"x-trip", func(m measured) float64 { return m.trip }},
	} {
		var our, their []float64
		for i := range got[bare] {
			by := figure.of(got[bare][i])
			our, their = append(our, figure.of(got[ours][i])/by), append(their, figure.of(got[tracked][i])/by)
		}
		b.ReportMetric(percentile(our, 0.5), figure.unit)
		b.ReportMetric(percentile(their, 0.5), "stateful-"+figure.unit)
	}
	var rates []float64
	for _, one := range got[bare] {
		rates = append(rates, one.bytesPerSecond*8/1e9)
	}
	b.ReportMetric(percentile(rates, 0.5), "bare-Gb/s")
}
