package conntrack

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nlattr"
)

// walkers is how many walks are on their way at a time: most of a walk is waiting for memory, and a node has other work.
const walkers = 2

// attempts bounds how often a walk that the kernel interrupted is made anew.
const attempts = 5

// socket talks to the kernel's connection tracking.
type socket struct{ netlink *nl.NetlinkSocket }

// open opens a socket in the network namespace of the calling thread; other threads may use it then.
func open() (socket, error) {
	s, err := nl.Subscribe(unix.NETLINK_NETFILTER)
	if err != nil {
		return socket{}, fmt.Errorf("opening a socket to connection tracking: %w", err)
	}
	return socket{s}, nil
}

func (s socket) close() { s.netlink.Close() }

// do sends a request and hands over the answers until yield returns false.
func (s socket) do(r *nl.NetlinkRequest, yield func(message []byte) bool) error {
	r.Sockets = map[int]*nl.SocketHandle{unix.NETLINK_NETFILTER: {Seq: r.Seq, Socket: s.netlink}}
	return r.ExecuteIter(unix.NETLINK_NETFILTER, 0, yield)
}

// mark sets or clears the mark of an entry.
func (s socket) mark(e entry, cut bool) error {
	return s.do(request(nl.IPCTNL_MSG_CT_NEW, unix.NLM_F_ACK, e.family(), e.marking(cut)), ignore)
}

// ignore passes over an answer.
func ignore([]byte) bool { return true }

// size returns how many connections there are.
func size() (int, error) {
	s, err := open()
	if err != nil {
		return 0, err
	}
	defer s.close()
	entries := 0
	// With an acknowledgement, because the answer looks like a part of a list that does not end.
	err = s.do(request(getStats, unix.NLM_F_ACK, unix.AF_UNSPEC, nil), func(message []byte) bool {
		for typ, v := range nlattr.All(message[min(nl.SizeofNfgenmsg, len(message)):]) {
			if typ == statsEntries && len(v) == 4 {
				entries = int(binary.BigEndian.Uint32(v))
			}
		}
		return true
	})
	if err != nil {
		return 0, fmt.Errorf("counting connections: %w", err)
	}
	return entries, nil
}

// each hands every connection that the walks find to do, in the calling goroutine while the walks go on, until do returns false.
// All walks are made, whatever becomes of one.
func each(walks []walk, do func(entry) bool) error {
	left := make(chan walk, len(walks))
	for _, w := range walks {
		left <- w
	}
	close(left)
	found, failed, stop := make(chan entry, 256), make(chan error, len(walks)), make(chan struct{})
	var running sync.WaitGroup
	var errs []error
	for range min(walkers, len(walks)) {
		s, err := open() // here, where the network namespace is the right one
		if err != nil {
			errs = append(errs, err)
			break
		}
		running.Go(func() {
			defer s.close()
			for w := range left {
				failed <- s.walk(w, found, stop)
			}
		})
	}
	go func() {
		running.Wait()
		close(found)
		close(failed)
	}()
	for e := range found {
		if !do(e) {
			close(stop)
			break
		}
	}
	for err := range failed {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// walk sends what one walk finds. What is found twice, because the kernel interrupted a walk, is sent twice. A message that
// cannot be read is an error, and keeps nothing else back.
func (s socket) walk(w walk, found chan<- entry, stop <-chan struct{}) error {
	for range attempts {
		var readErr error
		err := s.do(request(nl.IPCTNL_MSG_CT_GET, unix.NLM_F_DUMP, w.family, w.filter()), func(message []byte) bool {
			e, err := parse(message)
			if err != nil {
				readErr = err
				return true
			}
			if !w.wants(e.flow) {
				return true
			}
			select {
			case found <- e:
				return true
			case <-stop:
				return false
			}
		})
		if errors.Is(err, nl.ErrDumpInterrupted) {
			continue
		}
		if err = errors.Join(err, readErr); err != nil {
			return fmt.Errorf("reading the table of connections: %w", err)
		}
		return nil
	}
	return fmt.Errorf("reading the table of connections: it was interrupted %d times", attempts)
}
