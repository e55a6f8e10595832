package main

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
	"github.com/warren-cni/warren/pkg/mesh"
)

// clockPatience is how long after a correction of the clock it may take until both directions work.
const clockPatience = 30 * time.Second

// The clock of all nodes is an hour off, one way or the other, while they shake hands, and is then corrected: a new session can be had
// both ways soon, though WireGuard takes no handshake that is older than one it has seen. Only a virtual machine has a clock of its own;
// elsewhere the clock stays right, and no key changes. There is one clock, so the families of the endpoints come one after the other.
func TestClockIsCorrected(t *testing.T) {
	t.Parallel()
	for _, o := range []lab.Options{{Name: "wdclock"}, {Name: "wdclock6", IPv6Nodes: true}} {
		t.Run(endpointsOf(o), func(t *testing.T) { newRotating(t, o).correctClock() })
	}
}

// correctClock sets the clock, corrects it and starts all sessions anew each time.
func (r *rotating) correctClock() {
	r.t.Helper()
	var counters [2]*tagged.Counter
	for i, pod := range r.pods {
		counters[i] = r.counter(pod.Netns())
		gun := r.fire(r.pods[1-i], tagged.Fire{Tag: tagAllowed, Targets: pod.Addresses, Port: port, Every: often})
		r.t.Cleanup(gun.Cease)
	}
	// One node after the other has to begin: of both at once the handshakes would cross, for 5 s each time.
	anew := func(what string) {
		r.t.Helper()
		for i := range r.Nodes {
			since := now()
			r.forgetSessions(r.Nodes[i : i+1])
			for _, counter := range counters {
				r.arrives(counter, 50, nil)
			}
			took := time.Since(since)
			r.t.Logf("%s, %s begins: traffic both ways after %v", what, r.Nodes[i].Name, took)
			if took > clockPatience {
				r.t.Errorf("%s, %s begins: it took %v until traffic flowed both ways", what, r.Nodes[i].Name, took)
			}
		}
	}
	keys := [2]string{r.status(0).Encryption.PublicKey, r.status(1).Encryption.PublicKey}
	anew("the clock is right")
	r.reachedAt()
	if !soak.Emulated() {
		for i, key := range keys {
			if now := r.status(i).Encryption.PublicKey; now != key {
				r.t.Errorf("the key of %s changed", r.Nodes[i].Name)
			}
		}
		return
	}

	setClock(r.t, time.Hour)
	r.rotate(0) // so that both have seen handshakes of that hour
	r.rotate(1)
	anew("an hour ahead")
	setClock(r.t, -time.Hour)
	anew("corrected from an hour ahead")
	setClock(r.t, -time.Hour)
	anew("an hour behind")
	setClock(r.t, time.Hour)
	anew("corrected from an hour behind")

	// The clock is corrected while no daemon runs. The control: without one nobody helps.
	setClock(r.t, time.Hour)
	r.rotate(0)
	r.rotate(1)
	anew("an hour ahead again")
	for i := range r.Nodes {
		r.endDaemon(i, (*lab.Process).Kill)
	}
	setClock(r.t, -time.Hour)
	r.forgetSessions(r.Nodes)
	r.pause(time.Second) // what is under way arrives
	before := counters[0].Packets(nil) + counters[1].Packets(nil)
	r.pause(7 * time.Second) // a handshake is tried again after five
	if more := counters[0].Packets(nil) + counters[1].Packets(nil) - before; more > 0 {
		r.t.Errorf("without a daemon %d packets arrive: this test shows nothing", more)
	}
	for i := range r.Nodes {
		r.startDaemon(i)
	}
	anew("corrected before the daemons started")
}

// setClock sets the clock of this machine forward.
func setClock(t *testing.T, by time.Duration) {
	t.Helper()
	at := unix.NsecToTimespec(now().Add(by).UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &at); err != nil {
		t.Fatal(err)
	}
}

// forgetSessions makes both devices start all sessions anew.
func (r *rotating) forgetSessions(nodes []*lab.Node) {
	r.t.Helper()
	for _, n := range nodes {
		err := n.WireGuard(func(client *wgctrl.Client) error {
			device, err := client.Device(mesh.Link)
			if err != nil {
				return err
			}
			other, err := wgtypes.GeneratePrivateKey()
			if err != nil {
				return err
			}
			for _, key := range []wgtypes.Key{other, device.PrivateKey} {
				if err = client.ConfigureDevice(mesh.Link, wgtypes.Config{PrivateKey: &key}); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			r.t.Fatal(err)
		}
	}
}
