package main

import (
	"context"
	"errors"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/gate"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/podlink"
)

// del is DEL. It needs neither the daemon nor the network namespace nor a previous result.
func del(_ context.Context, args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	leases, err := conf.leases()
	if err != nil {
		return errors.Join(err, podlink.Detach(podlink.HostName(args.ContainerID, args.IfName)))
	}
	return release(leases, args.ContainerID, args.IfName)
}

// release takes away everything that an attachment has, whatever is left of it: passage through the gate, link, addresses.
// A step is tried even when the one before failed; but the addresses are kept while the link or a connection stands, so
// that no other pod gets an address that one still uses.
func release(leases *ipam.Store, containerID, ifname string) error {
	addresses, heldErr := leases.Held(containerID, ifname)
	gateErr := gate.Close(addresses)
	if errors.Is(gateErr, gate.ErrMissing) {
		gateErr = nil // the daemon is gone for good, or the node has rebooted
	}
	err := errors.Join(heldErr, gateErr)
	if linkErr := podlink.Detach(podlink.HostName(containerID, ifname)); linkErr != nil {
		return errors.Join(err, linkErr)
	}
	if forgetErr := conntrack.Forget(addresses); forgetErr != nil {
		return errors.Join(err, forgetErr)
	}
	_, releaseErr := leases.Release(containerID, ifname)
	return errors.Join(err, releaseErr)
}

// collect is GC: it releases every attachment that the runtime does not name as valid, and goes on after errors. Where the
// runtime names none at all, because the key is missing, nothing is removed.
func collect(_ context.Context, args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	if conf.ValidAttachments == nil {
		return nil
	}
	leases, err := conf.leases()
	if err != nil {
		return err
	}
	valid := make(map[types.GCAttachment]bool)
	links := make(map[string]bool)
	for _, a := range *conf.ValidAttachments {
		valid[a] = true
		links[podlink.HostName(a.ContainerID, a.IfName)] = true
	}
	owners, err := leases.Owners()
	errs := []error{err}
	for _, o := range owners {
		if !valid[types.GCAttachment{ContainerID: o.ContainerID, IfName: o.Interface}] {
			errs = append(errs, release(leases, o.ContainerID, o.Interface))
		}
	}
	// Links whose lease is gone.
	names, err := podlink.Links()
	errs = append(errs, err)
	for _, name := range names {
		if !links[name] {
			errs = append(errs, podlink.Detach(name))
		}
	}
	return errors.Join(errs...)
}
