package main

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/podlink"
)

// check is CHECK: lease, previous result, link, and the daemon have to agree.
func check(ctx context.Context, args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	if _, err = conf.ranges(); err != nil {
		return err
	}
	previous, err := conf.previous()
	if err != nil {
		return err
	}
	if previous == nil {
		return invalid("prevResult is missing")
	}
	owner, err := parseOwner(args)
	if err != nil {
		return err
	}
	if err = checkNetns(args.Netns); err != nil {
		return err
	}
	leases, err := conf.leases()
	if err != nil {
		return err
	}
	addresses, leaseErr := leases.Check(owner.ContainerID, owner.Interface)
	if len(addresses) == 0 {
		return fmt.Errorf("interface %s of container %s has no lease: %w", owner.Interface, owner.ContainerID, leaseErr)
	}
	pair := podlink.Plan(podlink.Spec{ContainerID: owner.ContainerID, Interface: owner.Interface, MTU: conf.MTU, Addresses: addresses})
	pair.MTU = mtuOf(previous, pair)
	_, daemonErr := conf.ask(ctx, agentapi.Request{Op: agentapi.OpCheck, Pod: request(owner, addresses)})
	return errors.Join(leaseErr, compare(previous, pair, args.Netns), podlink.Check(args.Netns, pair), daemonErr)
}

// mtuOf returns the MTU that the link got. The one that new links get may have changed since; it stands in where the result tells
// none (before CNI 1.1.0).
func mtuOf(result *current.Result, planned podlink.Pair) int {
	for _, i := range result.Interfaces {
		if i.Name == planned.Host.Name && i.Mtu > 0 {
			return i.Mtu
		}
	}
	return planned.MTU
}

// compare looks for the pod's link in the result. Plugins that come later in the chain may have added to it.
func compare(result *current.Result, pair podlink.Pair, netns string) error {
	var missing []error
	for _, end := range []current.Interface{{Name: pair.Host.Name}, {Name: pair.Pod.Name, Sandbox: netns}} {
		if !slices.ContainsFunc(result.Interfaces, func(i *current.Interface) bool { return i.Name == end.Name && i.Sandbox == end.Sandbox }) {
			missing = append(missing, fmt.Errorf("prevResult has no interface %s", end.Name))
		}
	}
	for _, p := range pair.Pod.Addresses {
		if !slices.ContainsFunc(result.IPs, func(ip *current.IPConfig) bool {
			a, _ := netip.AddrFromSlice(ip.Address.IP)
			return a.Unmap() == p.Addr()
		}) {
			missing = append(missing, fmt.Errorf("prevResult has no address %s, which is leased to the interface", p.Addr()))
		}
	}
	return errors.Join(missing...)
}

// statusPatience is how long STATUS waits for the daemon, which has the answer ready. A runtime asks every 5 s.
const statusPatience = 2 * time.Second

// status is STATUS: whether an ADD could succeed now, and whether the pods that run have all that they should.
func status(ctx context.Context, args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	ranges, err := conf.ranges()
	if err != nil {
		return err
	}
	patience, cancel := context.WithTimeout(ctx, statusPatience)
	defer cancel()
	response, err := conf.ask(patience, agentapi.Request{Op: agentapi.OpReady})
	if codeOf(err) == types.ErrLimitedConnectivity {
		return err
	}
	if err == nil {
		err = conf.hasRoom(ranges)
	}
	switch {
	case err != nil:
		return types.NewError(types.ErrPluginNotAvailable, err.Error(), "")
	case response.Limited != "":
		return types.NewError(types.ErrLimitedConnectivity, response.Limited, "")
	default:
		return nil
	}
}

// hasRoom returns an error where no ADD can get an address until a pod goes. Addresses that cool down are no reason: an ADD that needs
// one is told to try again, and succeeds within seconds, whereas a STATUS that fails makes the whole node NotReady, which takes the
// pods that run on it out of their Services.
func (c *config) hasRoom(ranges []netip.Prefix) error {
	leases, err := c.leases()
	if err != nil {
		return err
	}
	return leases.Room(ranges)
}
