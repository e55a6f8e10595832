package main

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/agentapi"
)

// TestDelEndsTraffic: when DEL returns no packet of the pod passes any more, though its link still stands until the daemon deletes all
// that ended with it; and the runtime may attach the same container again.
func TestDelEndsTraffic(t *testing.T) {
	n := newNode(t)
	p := n.newPod("web")
	before := n.state(p)
	run(t, n, "ip addr add 10.244.1.1/32 dev lo; ip addr add fd00:10:244:1::1/128 dev lo")
	n.mustAdd(p)
	pings := "for a in 10.244.1.1 fd00:10:244:1::1; do ping -c 1 -W 1 $a >/dev/null 2>&1 && echo $a; done; :"
	if got := len(strings.Fields(run(t, p, pings))); got != 2 {
		t.Fatalf("%d of 2 answer before DEL", got)
	}
	n.daemon.late.Store(true)
	if err := n.del(p); err != nil {
		t.Fatal(err)
	}
	if links := run(t, n, "ip -br link show type veth"); !strings.HasPrefix(links, "wrn-") || strings.Contains(links, "UP") {
		t.Fatalf("the link was not left to the daemon: %q", links)
	}
	if got := run(t, p, "ip link set eth0 up; "+pings); got != "" {
		t.Errorf("after DEL there answers %s", got)
	}
	if left := run(t, n, "ip route; ip -6 route | grep -v 'fe80\\|dev lo' || :; ip neigh; ls "+n.runDir+"/ipam"); left != "" {
		t.Errorf("left:\n%s", left)
	}
	n.mustAdd(p)
	if got := len(strings.Fields(run(t, p, pings))); got != 2 {
		t.Errorf("%d of 2 answer after the second ADD", got)
	}
	n.daemon.late.Store(false)
	if err := n.del(p); err != nil {
		t.Fatal(err)
	}
	run(t, n, "ip addr flush dev lo scope global")
	n.unchanged(before, p)
}

// TestDelDoesTheDaemonsPart where the daemon does not promise to do it.
func TestDelDoesTheDaemonsPart(t *testing.T) {
	hung := make(chan struct{})
	tests := map[string]func(*node){
		"away":          func(n *node) { n.stop() },
		"does not know": func(n *node) { n.daemon.answers(refuse(agentapi.OpReleased, 11, "unknown operation")) },
		"hangs": func(n *node) {
			n.daemon.answers(func(agentapi.Request) *agentapi.Error {
				<-hung
				return nil
			})
		},
	}
	for name, prepare := range tests {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			p := n.newPod("web")
			before := n.state(p)
			n.mustAdd(p)
			prepare(n)
			out, stderr, err := n.exec(p, "DEL")
			if name == "hangs" {
				close(hung)
			}
			if err != nil || out != "" || stderr != "" {
				t.Errorf("%v\n%s%s", err, out, stderr)
			}
			n.unchanged(before, p)
			if got := n.remembered(); got != nil {
				t.Errorf("the connections of %v were not ended", got)
			}
		})
	}
}

// TestDaemonOpensMeanwhile: until a lease has ended the daemon may let its addresses through the gate again that DEL, GC or an ADD that is
// undone has closed. They are closed when the command is over.
func TestDaemonOpensMeanwhile(t *testing.T) {
	for _, command := range []string{"DEL", "GC", "ADD"} {
		t.Run(command, func(t *testing.T) {
			n := newNode(t)
			p := n.newPod("web")
			before := n.state(p)
			var opened <-chan struct{}
			n.daemon.answers(func(req agentapi.Request) *agentapi.Error {
				if req.Op != agentapi.OpAttach || command != "ADD" {
					return nil
				}
				opened = n.overtake(req.Pod.Addresses)
				return &agentapi.Error{Code: types.ErrTryAgainLater, Message: "too late"}
			})
			if command != "ADD" {
				n.mustAdd(p)
				opened = n.overtake([]netip.Addr{netip.MustParseAddr("10.244.1.2"), netip.MustParseAddr("fd00:10:244:1::2")})
			}
			if out, stderr, err := n.exec(p, command, nothingValid); (err != nil) != (command == "ADD") || stderr != "" {
				t.Errorf("%v\n%s%s", err, out, stderr)
			}
			select {
			case <-opened:
			default:
				t.Error("nothing was opened meanwhile")
			}
			n.unchanged(before, p)
		})
	}
}

// overtake opens the gate for addresses, and once more when it is closed and their lease about to end.
func (n *node) overtake(addresses []netip.Addr) (opened <-chan struct{}) {
	n.t.Helper()
	lock, err := os.Open(filepath.Join(n.runDir, "ipam", ".lock"))
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		n.t.Error(err)
		return nil
	}
	open := func() {
		if err := openGate(addresses...); err != nil {
			n.t.Error(err)
		}
	}
	n.within(open)
	done := make(chan struct{})
	go n.within(func() {
		for len(n.open()) > 0 && n.t.Context().Err() == nil {
			runtime.Gosched()
		}
		open()
		close(done)
		_ = lock.Close() // which ends the lock
	})
	return done
}

// TestKilledDel kills DEL at each of its system calls that change something, in turn. What is left has no usable link once the lease
// is gone, and goes with the next DEL, or with GC.
func TestKilledDel(t *testing.T) {
	least := map[string]int{"sendto": 2, "flock": 1, "unlinkat": 1, "utimensat": 1, "renameat": 2, "connect": 1}
	for kind, calls := range least {
		t.Run(kind, func(t *testing.T) {
			for _, command := range []string{"DEL", "GC"} {
				untilAsMany(t, kind, calls, func() (killed int) {
					for killedDel(t, kind, killed+1, command) {
						killed++
					}
					return killed
				})
			}
		})
	}
}

// killedDel kills a DEL at its n-th call of a kind, if there is one, and says so. A command comes after it.
func killedDel(t *testing.T, kind string, at int, command string) (killed bool) {
	t.Helper()
	t.Run(fmt.Sprintf("%d then %s", at, command), func(t *testing.T) {
		n := newNode(t)
		p := n.newPod("web")
		before := n.state(p)
		n.mustAdd(p)
		killed = n.killedAt(p, "DEL", kind, at)
		leased, err := filepath.Glob(filepath.Join(n.runDir, "ipam", "[0-9a-f]*"))
		if err != nil {
			t.Fatal(err)
		}
		if up := run(t, n, "ip -br link show type veth up"); up != "" && len(leased) < 2 {
			t.Errorf("with the leases %v the link is up: %s", leased, up)
		}
		out, stderr, err := n.exec(p, command, nothingValid)
		if err != nil || out != "" || stderr != "" {
			t.Errorf("%s: %v\n%s%s", command, err, out, stderr)
		}
		n.unchanged(before, p)
	})
	return killed
}

// TestGCDeletesTrash: what a DEL has put away already, without a daemon.
func TestGCDeletesTrash(t *testing.T) {
	n := newNode(t)
	var pods []*pod
	for i := range 3 {
		pods = append(pods, n.newPod(fmt.Sprintf("p%d", i)))
	}
	before := n.state(pods...)
	n.daemon.late.Store(true)
	for _, p := range pods {
		n.mustAdd(p)
		n.mustExec(p, "DEL")
	}
	if links := run(t, n, "ip -br link show type veth"); links == "" {
		t.Fatal("nothing is put away")
	}
	n.stop()
	out, _, err := n.exec(pods[0], "GC", nothingValid)
	if err != nil {
		t.Errorf("%v: %s", err, out)
	}
	n.unchanged(before, pods...)
	if diff := cmp.Diff([]string(nil), n.remembered()); diff != "" {
		t.Errorf("addresses whose connections were not ended (-want +got):\n%s", diff)
	}
}
