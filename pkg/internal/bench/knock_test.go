package bench

import (
	"encoding/binary"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/lab"
)

// The SYNs of a knocker: where they go, and their source ports, which tell them apart.
const (
	knockPort  = 8080
	firstPort  = 2000
	knockPorts = 60_000
)

// knocker sends a SYN every millisecond from a pod to another, and knows which arrived there.
type knocker struct {
	mu      sync.Mutex
	sent    []time.Time
	arrived []bool
	err     error
}

// knock starts to send, until the benchmark ends.
func knock(b *testing.B, from, to *lab.Pod) *knocker {
	b.Helper()
	k := &knocker{}
	var socket int
	err := to.Netns().Do(func(ns.NetNS) (err error) {
		const ip = unix.ETH_P_IP>>8 | unix.ETH_P_IP&0xff<<8 // in network order
		if socket, err = unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, ip); err != nil {
			return err
		}
		return unix.SetsockoptTimeval(socket, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000})
	})
	if err != nil {
		b.Fatal(err)
	}
	done := make(chan struct{})
	var running sync.WaitGroup
	running.Go(func() { k.receive(socket, done) })
	running.Go(func() {
		target := &unix.SockaddrInet4{Port: knockPort, Addr: to.Addresses[0].As4()}
		if err := from.Netns().Do(func(ns.NetNS) error { return k.send(from.Addresses[0], target, done) }); err != nil {
			k.mu.Lock()
			defer k.mu.Unlock()
			k.err = err
		}
	})
	b.Cleanup(func() {
		close(done)
		running.Wait()
		_ = unix.Close(socket)
		if k.err != nil {
			b.Error(k.err)
		}
	})
	return k
}

// send sends the SYNs.
func (k *knocker) send(from netip.Addr, target unix.Sockaddr, done <-chan struct{}) error {
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for i := 0; ; i++ {
		select {
		case <-done:
			return nil
		case <-tick.C:
		}
		k.mu.Lock()
		k.sent, k.arrived = append(k.sent, time.Now()), append(k.arrived, false) //nolint:forbidigo // a measurement
		k.mu.Unlock()
		if err := syn(&unix.SockaddrInet4{Port: firstPort + i%knockPorts, Addr: from.As4()}, target); err != nil {
			return err
		}
	}
}

// syn lets the kernel send one SYN, and no second.
func syn(from, to unix.Sockaddr) error {
	socket, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer func() { _ = unix.Close(socket) }()
	if err = unix.SetsockoptInt(socket, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1); err != nil {
		return err
	}
	if err = unix.Bind(socket, from); err != nil {
		return err
	}
	if err = unix.Connect(socket, to); err != unix.EINPROGRESS && err != unix.ECONNREFUSED {
		return err
	}
	return nil
}

// receive notes which SYNs arrive.
func (k *knocker) receive(socket int, done <-chan struct{}) {
	packet := make([]byte, 256)
	for {
		n, _, err := unix.Recvfrom(socket, packet, 0)
		select {
		case <-done:
			return
		default:
		}
		const ack, onlySYN = 0x10, 0x02
		if err != nil || n < 40 || packet[9] != unix.IPPROTO_TCP {
			continue
		}
		tcp := packet[4*int(packet[0]&0xf):]
		if binary.BigEndian.Uint16(tcp[2:]) != knockPort || tcp[13]&(ack|onlySYN) != onlySYN {
			continue
		}
		k.arrive(int(binary.BigEndian.Uint16(tcp)) - firstPort)
	}
}

// arrive notes the youngest SYN of a source port.
func (k *knocker) arrive(port int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	last := len(k.sent) - 1
	k.arrived[last-(last%knockPorts-port+knockPorts)%knockPorts] = true
}

// settled says whether the verdict about the last SYNs, all sent since a time, is the one that is wanted.
func (k *knocker) settled(since time.Time, through bool) bool {
	const enough = 15
	k.mu.Lock()
	defer k.mu.Unlock()
	// The very last are perhaps on their way.
	judged := len(k.sent) - 3
	if judged < enough || !k.sent[judged-enough].After(since) {
		return false
	}
	for _, arrived := range k.arrived[judged-enough : judged] {
		if arrived != through {
			return false
		}
	}
	return true
}

// judgedAnew returns when the first SYN was sent, between two times, from which on all were judged as wanted.
func (k *knocker) judgedAnew(begin, end time.Time, through bool) time.Time {
	k.mu.Lock()
	defer k.mu.Unlock()
	var first time.Time
	for i := len(k.sent) - 1; i >= 0 && k.sent[i].After(begin); i-- {
		if k.sent[i].After(end) {
			continue
		}
		if k.arrived[i] != through {
			break
		}
		first = k.sent[i]
	}
	return first
}
