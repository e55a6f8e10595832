package tagged

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
)

// Delivery counts the packets with a tag that are delivered to the processes of a network namespace: those that none of its
// filters dropped, also not on the way in.
type Delivery struct {
	tag     [tagSize]byte
	sockets []net.PacketConn
	packets atomic.Int64
}

// Deliver begins to count in a network namespace.
func Deliver(netns ns.NetNS, tag uint32) (*Delivery, error) {
	d := &Delivery{}
	binary.BigEndian.PutUint32(d.tag[:], magic)
	binary.BigEndian.PutUint32(d.tag[4:], tag)
	err := netns.Do(func(ns.NetNS) error {
		for _, network := range []string{"ip4:tcp", "ip4:udp", "ip4:icmp", "ip6:tcp", "ip6:udp", "ip6:ipv6-icmp"} {
			socket, err := net.ListenPacket(network, "") //nolint:noctx // it does not wait
			if err != nil {
				return err
			}
			d.sockets = append(d.sockets, socket)
		}
		return nil
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("counting deliveries: %w", err), d.Stop())
	}
	for _, socket := range d.sockets {
		go d.read(socket)
	}
	return d, nil
}

// read counts until Stop.
func (d *Delivery) read(socket net.PacketConn) {
	for buffer := make([]byte, 64<<10); ; {
		n, _, err := socket.ReadFrom(buffer)
		if errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
			return
		}
		if bytes.Contains(buffer[:n], d.tag[:]) {
			d.packets.Add(1)
		}
	}
}

// Packets is how many packets were delivered.
func (d *Delivery) Packets() int64 { return d.packets.Load() }

// Stop ends the count.
func (d *Delivery) Stop() error {
	var errs []error
	for _, socket := range d.sockets {
		errs = append(errs, socket.SetReadDeadline(time.Unix(1, 0)), socket.Close())
	}
	return errors.Join(errs...)
}
