package bench

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/internal/measure"
	"github.com/warren-cni/warren/pkg/lab"
)

// Ports of the servers in each target.
const (
	requestPort = 8080
	streamPort  = 8081
	packetPort  = 8082
)

// slice is how long one kind of traffic goes to one target at a time.
const slice = 200 * time.Millisecond

// target is a pod that traffic goes to, from a client on its node.
type target struct {
	name           string
	client, server *lab.Pod
	// stream and packets are connections that live as long as the benchmark.
	stream, packets net.Conn
	// servers are those of the server, beside the one of the requests.
	servers []io.Closer
	// streamed are the bytes of the stream, and counted the packets, that arrived.
	streamed, counted atomic.Int64
}

// BenchmarkDatapath sends traffic between two pods of a node, where no policy concerns them, where a thousand concern other pods,
// and where 10, 100 and 1000 isolate the server, of which the last lets the client in. The targets take turns; what is
// reported is what gets through, of what does where no policy is, by time ("x-") and by the processor's time ("cpu-x-").
func BenchmarkDatapath(b *testing.B) {
	s := newStage(b, "datapath", 2)
	s.start(noFlags)
	client := s.pod(0, "client", "client")
	targets := []*target{s.target(1, s.pod(1, "far-client", "client"), "none"), s.target(0, client, "others")}
	for _, n := range []int{10, 100, 1000} {
		name := fmt.Sprintf("own-%d", n)
		s.isolate(name, n)
		targets = append(targets, s.target(0, client, name))
	}
	stranger := s.pod(0, "stranger", "stranger")
	for _, t := range targets[2:] { // the rules stand
		s.probe(stranger, t.server, requestPort, false)
	}
	for _, t := range targets {
		s.probe(t.client, t.server, requestPort, true)
		t.connect(b)
	}
	for _, traffic := range []struct {
		name string
		run  func(*target) (int64, error)
	}{{"stream", (*target).runStream}, {"packets", (*target).runPackets}, {"requests", (*target).runRequests}} {
		b.Run(traffic.name, func(b *testing.B) { compare(b, targets, traffic.run) })
	}
}

// isolate lets nobody in to an app but by a number of policies, the last of which lets in the client.
func (s *stage) isolate(server string, policies int) {
	s.b.Helper()
	var objects []any
	for i := range policies - 1 {
		name := fmt.Sprintf("%04d", i)
		objects = append(objects, ingress(server+"-"+name, server, "peer-"+name, int32(20_000+i)))
	}
	s.write("policies-"+server, append(objects, ingress(server+"-last", server, "client", 0))...)
}

// target makes a server beside a client; its label app is its name.
func (s *stage) target(node int, client *lab.Pod, name string) *target {
	s.b.Helper()
	t := &target{name: name, client: client, server: s.pod(node, "server-"+name, name)}
	s.echo(t.server, requestPort)
	s.within(t.server, t.serve)
	s.b.Cleanup(func() {
		for _, c := range t.servers {
			_ = c.Close()
		}
	})
	return t
}

// serve starts the servers of the stream and of the packets, in the network namespace of the calling thread.
func (t *target) serve() error {
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{Port: streamPort})
	if err != nil {
		return err
	}
	socket, err := net.ListenUDP("udp4", &net.UDPAddr{Port: packetPort})
	if err != nil {
		return errors.Join(err, listener.Close())
	}
	t.servers = []io.Closer{listener, socket}
	go func() {
		connection, err := listener.Accept()
		if err != nil {
			return
		}
		for buffer := make([]byte, 1<<18); err == nil; {
			var n int
			n, err = connection.Read(buffer)
			t.streamed.Add(int64(n))
		}
		_ = connection.Close()
	}()
	go func() {
		for buffer := make([]byte, 64); ; {
			n, from, err := socket.ReadFrom(buffer)
			if err != nil {
				return
			}
			if t.counted.Add(1) == 1 { // so that the connection is established
				_, _ = socket.WriteTo(buffer[:n], from)
			}
		}
	}()
	return nil
}

// connect makes the connections that live as long as the benchmark.
func (t *target) connect(b *testing.B) {
	b.Helper()
	err := t.client.Netns().Do(func(ns.NetNS) (err error) {
		to := func(port uint16) string { return netip.AddrPortFrom(t.server.Addresses[0], port).String() }
		dialer := net.Dialer{Timeout: patience}
		if t.stream, err = dialer.DialContext(b.Context(), "tcp4", to(streamPort)); err != nil {
			return err
		}
		if t.packets, err = dialer.DialContext(b.Context(), "udp4", to(packetPort)); err != nil {
			return err
		}
		if _, err = t.packets.Write([]byte{0}); err != nil {
			return err
		}
		_, err = t.packets.Read([]byte{0})
		return err
	})
	if err != nil {
		b.Fatalf("connecting to %s: %v", t.name, err)
	}
	b.Cleanup(func() { _, _ = t.stream.Close(), t.packets.Close() })
}

// runStream writes to the stream for a slice of time, and returns the bytes that arrived.
func (t *target) runStream() (int64, error) {
	before := t.streamed.Load()
	err := write(t.stream, make([]byte, 1<<17), slice)
	return t.streamed.Load() - before, err
}

// runPackets sends small packets for a slice of time, and returns those that arrived.
func (t *target) runPackets() (int64, error) {
	before := t.counted.Load()
	err := write(t.packets, make([]byte, 32), slice)
	return t.counted.Load() - before, err
}

// write writes the same again and again for a while.
func write(to io.Writer, data []byte, while time.Duration) error {
	for end := time.Now().Add(while); time.Now().Before(end); { //nolint:forbidigo // a measurement
		if _, err := to.Write(data); err != nil {
			return err
		}
	}
	return nil
}

// runRequests connects, sends, reads the answer and closes, for a slice of time, and returns how often.
func (t *target) runRequests() (done int64, err error) {
	err = t.client.Netns().Do(func(ns.NetNS) error {
		to := net.TCPAddrFromAddrPort(netip.AddrPortFrom(t.server.Addresses[0], requestPort))
		marker := lab.NewMarker()
		for end := time.Now().Add(slice); time.Now().Before(end); done++ { //nolint:forbidigo // a measurement
			connection, err := net.DialTCP("tcp4", nil, to)
			if err != nil {
				return err
			}
			_, err = connection.Write(marker[:])
			if err == nil {
				_, err = io.ReadFull(connection, marker[:])
			}
			// Without waiting states, of which there is no end of ports.
			if err = errors.Join(err, connection.SetLinger(0), connection.Close()); err != nil {
				return err
			}
		}
		return nil
	})
	return done, err
}

// compare lets the targets take turns, and reports the medians of what each does of what the first does.
func compare(b *testing.B, targets []*target, run func(*target) (int64, error)) {
	b.Helper()
	byTime, byCPU := make([][]float64, len(targets)), make([][]float64, len(targets))
	var first []float64
	for b.Loop() {
		var rates, perCPU [2]float64
		for i, t := range targets {
			used, began := measure.CPU(), time.Now() //nolint:forbidigo // a measurement
			n, err := run(t)
			took := time.Since(began)
			if err != nil || n == 0 {
				b.Fatalf("traffic to %s: %d got through, error %v", t.name, n, err)
			}
			rates[min(i, 1)], perCPU[min(i, 1)] = float64(n)/took.Seconds(), float64(n)/(measure.CPU()-used).Seconds()
			if i == 0 {
				first = append(first, rates[0])
				continue
			}
			byTime[i] = append(byTime[i], rates[1]/rates[0])
			byCPU[i] = append(byCPU[i], perCPU[1]/perCPU[0])
		}
	}
	b.ReportMetric(percentile(first, 0.5), "none/s")
	for i, t := range targets[1:] {
		b.ReportMetric(percentile(byTime[i+1], 0.5), "x-"+t.name)
		b.ReportMetric(percentile(byCPU[i+1], 0.5), "cpu-x-"+t.name)
	}
}
