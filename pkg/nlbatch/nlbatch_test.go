package nlbatch_test

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nlbatch"
	"github.com/warren-cni/warren/pkg/testnode"
)

// loopback is the index of lo in every network namespace.
const loopback = 1

// address makes a message that adds or removes an IPv4 address.
func address(command, flags, index int, last byte) *nl.NetlinkRequest {
	message := nl.NewIfAddrmsg(unix.AF_INET)
	message.Index, message.Prefixlen = uint32(index), 32
	request := nl.NewNetlinkRequest(command, flags)
	request.AddData(message)
	request.AddData(nl.NewRtAttr(unix.IFA_LOCAL, []byte{10, 0, 0, last}))
	return request
}

func add(index int, last byte) nlbatch.Step {
	return nlbatch.Step{
		What:    fmt.Sprintf("adding 10.0.0.%d", last),
		Request: address(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, index, last),
	}
}

func open(t *testing.T) *nlbatch.Socket {
	t.Helper()
	testnode.Enter(t)
	s, err := nlbatch.Open(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Close)
	return s
}

// What fails is named, wherever it stands, and all else is done: each address can be removed once.
func TestDo(t *testing.T) {
	s := open(t)
	gone := add(9999, 3)
	gone.MayBe = unix.ENODEV
	err := s.Do(add(loopback, 1), add(9999, 2), gone, add(loopback, 1), add(loopback, 4), add(9999, 5))
	want := []string{"adding 10.0.0.2: no such device", "adding 10.0.0.1: file exists", "adding 10.0.0.5: no such device"}
	if err == nil || err.Error() != strings.Join(want, "\n") || !errors.Is(err, unix.EEXIST) {
		t.Errorf("error %v, want %v", err, want)
	}
	for _, last := range []byte{1, 4} {
		remove := nlbatch.Step{What: "removing", Request: address(unix.RTM_DELADDR, 0, loopback, last)}
		if err = s.Do(remove); err != nil {
			t.Errorf("10.0.0.%d was not added: %v", last, err)
		}
	}
	if err = s.Do(); err != nil {
		t.Errorf("nothing to do: %v", err)
	}
}

// More steps than a batch has are done all, and what fails in each batch is named.
func TestDoMany(t *testing.T) {
	s := open(t)
	var steps []nlbatch.Step
	for last := range byte(200) {
		steps = append(steps, add(loopback, last), add(loopback, last))
	}
	err := s.Do(steps...)
	if err == nil || strings.Count(err.Error(), "file exists") != 200 {
		t.Errorf("error %v, want one for each address", err)
	}
}

// The kernel sends a request back that it refuses. One that is longer than what is read of it is refused all the same.
func TestDoLong(t *testing.T) {
	s := open(t)
	long := add(9999, 1)
	for range 2 { // attributes that the kernel does not know, each as long as one can be
		long.Request.AddData(nl.NewRtAttr(200, make([]byte, 60<<10)))
	}
	if err := s.Do(long); !errors.Is(err, unix.ENODEV) {
		t.Errorf("error %v, want %v", err, unix.ENODEV)
	}
}

// Nobody but the kernel can answer: what another program sends is refused.
func TestDoBesideAForger(t *testing.T) {
	s := open(t)
	own, err := unix.Getsockname(s.FD())
	if err != nil {
		t.Fatal(err)
	}
	if own.(*unix.SockaddrNetlink).Pid == 0 {
		t.Fatal("the socket has no address that anything could be sent to")
	}
	forger, err := nlbatch.Open(unix.NETLINK_ROUTE)
	if err != nil {
		t.Fatal(err)
	}
	defer forger.Close()
	forged := binary.NativeEndian.AppendUint32(nil, unix.SizeofNlMsghdr+4)
	forged = binary.NativeEndian.AppendUint16(forged, unix.NLMSG_ERROR)
	forged = binary.NativeEndian.AppendUint16(forged, 0)
	forged = binary.NativeEndian.AppendUint32(forged, 1) // the number of the socket's first request
	forged = append(forged, make([]byte, 8)...)          // the sender, and that there is no error
	if err = unix.Sendto(forger.FD(), forged, 0, own); !errors.Is(err, unix.ECONNREFUSED) {
		t.Errorf("a forged answer: %v", err)
	}
	if err = s.Do(add(9999, 1)); !errors.Is(err, unix.ENODEV) {
		t.Errorf("error %v, want %v", err, unix.ENODEV)
	}
}
