// Package nflog is the boundary towards the kernel's packet log: it reads the beginnings of packets that rules with the target
// NFLOG meet, over netlink.
//
// It reads one group of one network namespace. Only one program can do that at a time. A reader that is too slow loses packets and
// learns how many; the packets themselves and their rules never wait for it.
package nflog

import (
	"errors"
	"fmt"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// The numbers of linux/netfilter/nfnetlink_log.h.
const (
	messagePacket = unix.NFNL_SUBSYS_ULOG << 8   // NFULNL_MSG_PACKET
	messageConfig = unix.NFNL_SUBSYS_ULOG<<8 | 1 // NFULNL_MSG_CONFIG
	configCommand = 1                            // NFULA_CFG_CMD
	configMode    = 2                            // NFULA_CFG_MODE
	configTimeout = 4                            // NFULA_CFG_TIMEOUT
	configFlags   = 6                            // NFULA_CFG_FLAGS
	commandBind   = 1                            // NFULNL_CFG_CMD_BIND
	copyPacket    = 2                            // NFULNL_COPY_PACKET
	flagSequence  = 1                            // NFULNL_CFG_F_SEQ
)

// flushAfter is how long the kernel may hold packets back to send several at once, in hundredths of a second.
const flushAfter = 10

// copyRange is how much of each packet is read, in bytes: IPv6's header, some extension headers and the ports.
const copyRange = 96

// ErrTaken says that another program may read the group already. The kernel has the same answer for who lacks NET_ADMIN.
var ErrTaken = errors.New("another program reads it, or the capability NET_ADMIN is missing")

// Reader reads a group.
type Reader struct {
	socket *nl.NetlinkSocket
	// next is the number that the next packet has where none is lost.
	next uint32
}

// Open begins to read a group, in the network namespace of the calling thread. The error is ErrTaken where another program does.
func Open(group uint16) (*Reader, error) {
	socket, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("opening a socket to the packet log: %w", err)
	}
	request := nl.NewNetlinkRequest(messageConfig, unix.NLM_F_ACK)
	request.AddData(&nl.Nfgenmsg{ResId: nl.Swap16(group)})
	for _, a := range []struct {
		typ   int
		value []byte
	}{
		{configCommand, []byte{commandBind}},
		{configMode, append(nl.BEUint32Attr(copyRange), copyPacket, 0)},
		{configTimeout, nl.BEUint32Attr(flushAfter)},
		{configFlags, nl.BEUint16Attr(flagSequence)},
	} {
		request.AddData(nl.NewRtAttr(a.typ, a.value))
	}
	request.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Seq: request.Seq, Socket: socket}}
	if _, err = request.Execute(unix.NETLINK_NETFILTER, 0); err != nil {
		socket.Close()
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EBUSY) {
			err = fmt.Errorf("%w: %w", ErrTaken, err)
		}
		return nil, fmt.Errorf("reading group %d of the packet log: %w", group, err)
	}
	return &Reader{socket: socket}, nil
}

// Close ends a Read that waits. What the kernel still holds is lost.
func (r *Reader) Close() { r.socket.Close() }

// Read waits for packets and returns them, and how many were lost before them and between them.
func (r *Reader) Read() (packets []Packet, lost uint32, err error) {
	for len(packets) == 0 {
		messages, _, err := r.socket.Receive()
		if errors.Is(err, unix.ENOBUFS) {
			continue // the numbers of the next packets tell how many it were
		}
		if err != nil {
			return nil, 0, fmt.Errorf("reading the packet log: %w", err)
		}
		for _, m := range messages {
			if m.Header.Type != messagePacket {
				continue
			}
			p, number, numbered := parseMessage(m.Data)
			if numbered {
				lost += number - r.next
				r.next = number + 1
			}
			packets = append(packets, p)
		}
	}
	return packets, lost, nil
}
