package nflog_test

import (
	"errors"
	"net"
	"net/netip"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nflog"
	"github.com/warren-cni/warren/pkg/testnode"
)

const group = 87

// run runs a command in the test's network namespace.
func run(t *testing.T, command string) {
	t.Helper()
	args := strings.Fields(command)
	if out, err := exec.CommandContext(t.Context(), args[0], args[1:]...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", command, err, out)
	}
}

// open begins to read.
func open(t *testing.T) *nflog.Reader {
	t.Helper()
	reader, err := nflog.Open(group)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(reader.Close)
	return reader
}

// send sends datagrams to a port of an address of the own node.
func send(t *testing.T, to netip.AddrPort, count int) netip.AddrPort {
	t.Helper()
	socket, err := new(net.Dialer).DialContext(t.Context(), "udp", to.String())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = socket.Close() }()
	for sent := 0; sent < count; {
		if _, err = socket.Write([]byte("to nobody")); err == nil { // else the one before was refused, and this one not sent
			sent++
		}
	}
	return socket.LocalAddr().(*net.UDPAddr).AddrPort()
}

// Packets that rules of either backend log are read in both families; what has another group, or no rule, is not.
func TestReadsRules(t *testing.T) {
	for _, backend := range []string{"nft", "legacy"} {
		t.Run(backend, func(t *testing.T) {
			testnode.Enter(t)
			reader := open(t)
			for tables, address := range map[string]string{"iptables": "127.0.0.1", "ip6tables": "::1"} {
				rule := tables + "-" + backend + " -w -t mangle -A OUTPUT -p udp --dport "
				run(t, rule+"7 -j NFLOG --nflog-group 87 --nflog-size 96 --nflog-prefix D:WARREN-I-ABCDEFGHIJKLMNOP")
				run(t, rule+"8 -j NFLOG --nflog-group 86 --nflog-prefix other")
				to := netip.MustParseAddr(address)
				send(t, netip.AddrPortFrom(to, 8), 1)
				send(t, netip.AddrPortFrom(to, 9), 1)
				from := send(t, netip.AddrPortFrom(to, 7), 1)
				packets, lost, err := reader.Read()
				if err != nil || lost != 0 {
					t.Fatalf("lost %d, %v", lost, err)
				}
				want := nflog.Packet{
					Prefix: "D:WARREN-I-ABCDEFGHIJKLMNOP", Protocol: unix.IPPROTO_UDP, Source: from, Destination: netip.AddrPortFrom(to, 7),
				}
				if len(packets) != 1 || packets[0] != want {
					t.Errorf("read %+v, want %+v", packets, want)
				}
			}
		})
	}
}

// A group has one reader at a time, and another one once that is closed.
func TestOneReader(t *testing.T) {
	testnode.Enter(t)
	first := open(t)
	if _, err := nflog.Open(group); !errors.Is(err, nflog.ErrTaken) {
		t.Errorf("a second reader gets %v, want %v", err, nflog.ErrTaken)
	}
	first.Close()
	open(t)
}

// Close ends a Read that waits.
func TestCloseEndsRead(t *testing.T) {
	testnode.Enter(t)
	reader := open(t)
	ended := make(chan error)
	go func() {
		_, _, err := reader.Read()
		ended <- err
	}()
	reader.Close()
	select {
	case err := <-ended:
		if err == nil {
			t.Error("a read that was closed is well")
		}
	case <-time.After(10 * time.Second):
		t.Error("it reads on")
	}
}

// A reader that does not read loses packets, learns how many, and goes on.
func TestLostAreCounted(t *testing.T) {
	testnode.Enter(t)
	reader := open(t)
	run(t, "iptables-nft -t mangle -A OUTPUT -p udp --dport 7 -j NFLOG --nflog-group 87 --nflog-prefix flood")
	run(t, "iptables-nft -t mangle -A OUTPUT -p udp --dport 9 -j NFLOG --nflog-group 87 --nflog-prefix last")
	const flood = 20_000
	to := netip.MustParseAddr("127.0.0.1")
	send(t, netip.AddrPortFrom(to, 7), flood)
	var read, lost int
	count := func() string {
		packets, more, err := reader.Read()
		if err != nil {
			t.Fatal(err)
		}
		read, lost = read+len(packets), lost+int(more)
		return packets[len(packets)-1].Prefix
	}
	count() // makes room for the last
	for send(t, netip.AddrPortFrom(to, 9), 1); count() != "last"; {
		send(t, netip.AddrPortFrom(to, 9), 1) // what is in the way may take its place
	}
	if read+lost <= flood || lost == 0 || read == 0 {
		t.Errorf("of more than %d packets %d were read and %d lost", flood, read, lost)
	}
	t.Logf("%d read, %d lost", read, lost)
}
