package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/gate"
	"github.com/warren-cni/warren/pkg/inflight"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/podlink"
)

// delPatience is how long DEL waits for another who works on the same attachment: an ADD that the runtime gave up, another DEL.
const delPatience = 10 * time.Second

// sweepPatience is how long DEL waits for the daemon before it does the daemon's part itself.
const sweepPatience = time.Second

// del is DEL. It needs neither the daemon nor the network namespace nor a previous result.
func del(ctx context.Context, args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	patience, cancel := context.WithTimeout(ctx, delPatience)
	defer cancel()
	// Nothing keeps a DEL from its work, neither somebody who takes too long nor a lock that cannot be made: each step of it does no
	// harm beside another's.
	if end, lockErr := inflight.In(conf.RunDir).Begin(patience, podlink.HostName(args.ContainerID, args.IfName)); lockErr == nil {
		defer end()
	}
	leases, err := conf.leases()
	if err != nil {
		return errors.Join(laterIfUnwritable(err), podlink.Detach(podlink.HostName(args.ContainerID, args.IfName)), podlink.Sweep())
	}
	return errors.Join(release(leases, args.ContainerID, args.IfName), conf.sweep(ctx, leases))
}

// release takes away what is left of an attachment; sweep has to come after it. The addresses are kept where it cannot be retired: while
// the link stands, so that no other pod gets an address that one still uses, and while the gate may be open for them, so that the next
// DEL knows what to close.
func release(leases *ipam.Store, containerID, ifname string) error {
	if err := retire(leases, containerID, ifname); err != nil {
		return err
	}
	return free(leases, containerID, ifname)
}

// retire takes an attachment out of service: passage through the gate, and link. When it has returned no packet of the pod passes any more.
// A step is tried even when the one before failed.
func retire(leases *ipam.Store, containerID, ifname string) error {
	addresses, err := leases.Held(containerID, ifname)
	return errors.Join(err, gate.CloseBehind(addresses), podlink.Detach(podlink.HostName(containerID, ifname)))
}

// free ends the lease of an attachment. The daemon may have let the addresses through the gate again meanwhile, by an audit or an attach
// that nobody waits for any more: it does for those that hold a lease. Now it does not, so the gate is closed once more, and for nobody
// else: nobody gets an address that cools down.
func free(leases *ipam.Store, containerID, ifname string) error {
	addresses, err := leases.Release(containerID, ifname)
	return errors.Join(laterIfUnwritable(err), gate.CloseBehind(addresses))
}

// laterIfUnwritable returns no error where it is that a file system takes no changes. A lease that is left then keeps its address, and ends
// with the next DEL or GC, or by the daemon, once that is over. To fail would make the runtime repeat all else, which is done.
func laterIfUnwritable(err error) error {
	if !errors.Is(err, unix.EROFS) && !errors.Is(err, unix.ENOSPC) {
		return err
	}
	fmt.Fprintln(os.Stderr, "warren: the lease ends later:", err)
	return nil
}

// sweep sees to it that the links that were released are deleted, and that their connections are before the addresses have cooled
// down. That takes long, but not longer for many; so the daemon does it for all that end at the same time, where there is one.
func (c *config) sweep(ctx context.Context, leases *ipam.Store) error {
	patience, cancel := context.WithTimeout(ctx, sweepPatience)
	defer cancel()
	if _, err := c.ask(patience, agentapi.Request{Op: agentapi.OpReleased}); err == nil {
		return nil
	}
	return errors.Join(podlink.Sweep(), laterIfUnwritable(leases.Forget(conntrack.Forget)))
}
