package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"

	cnins "github.com/containernetworking/cni/pkg/ns"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/gate"
	"github.com/warren-cni/warren/pkg/inflight"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/podlink"
)

// add is ADD: lease, close the gate, wire, and have the daemon open the gate. What fails after the lease is undone.
func add(ctx context.Context, args *skel.CmdArgs) error {
	conf, err := parseConfig(args.StdinData)
	if err != nil {
		return err
	}
	ranges, err := conf.ranges()
	if err != nil {
		return err
	}
	previous, err := conf.previous()
	if err != nil {
		return err
	}
	owner, err := parseOwner(args)
	if err != nil {
		return err
	}
	if err = checkNetns(args.Netns); err != nil {
		return err
	}
	// Asked first, so that with the daemon away nothing has to be undone.
	if _, err = conf.ask(ctx, agentapi.Request{Op: agentapi.OpReady}); err != nil {
		return err
	}
	end, err := inflight.In(conf.RunDir).Begin(ctx, podlink.HostName(owner.ContainerID, owner.Interface))
	if err != nil {
		return err
	}
	defer end()
	leases, err := conf.leases()
	if err != nil {
		return err
	}
	addresses, err := leases.Allocate(ranges, owner)
	if err != nil {
		return err
	}
	pair := podlink.Plan(podlink.Spec{ContainerID: owner.ContainerID, Interface: owner.Interface, MTU: conf.MTU, Addresses: addresses})
	if err = attach(ctx, conf, args.Netns, owner, pair); err == nil {
		err = types.PrintResult(extend(previous, pair, args.Netns), conf.CNIVersion)
	}
	if err != nil {
		return errors.Join(err, release(leases, owner.ContainerID, owner.Interface), conf.sweep(ctx, leases))
	}
	return nil
}

// attach wires the pod, and meanwhile has the daemon put its policies into the kernel and let its traffic pass. It is over when both
// are; what the daemon has begun and does after it refused or was not heard any more, free undoes.
func attach(ctx context.Context, conf *config, netns string, owner ipam.Owner, pair podlink.Pair) error {
	addresses := addressesOf(pair)
	// The daemon may not yet know that the addresses have another pod now: without this, the new pod would pass the gate as
	// the old one, before its own policies stand.
	if err := gate.Close(addresses); err != nil {
		return err
	}
	passes := make(chan error, 1)
	go func() {
		_, err := conf.ask(ctx, agentapi.Request{Op: agentapi.OpAttach, Pod: request(owner, addresses)})
		passes <- err
	}()
	runtime.Gosched() // so that the daemon is asked before the kernel keeps this thread busy
	err := podlink.Attach(netns, pair)
	return errors.Join(err, <-passes)
}

// request names an attachment to the daemon.
func request(owner ipam.Owner, addresses []netip.Addr) *agentapi.Pod {
	return &agentapi.Pod{
		ContainerID: owner.ContainerID, Interface: owner.Interface,
		Namespace: owner.Namespace, Name: owner.Name, UID: owner.UID, Addresses: addresses,
	}
}

// addressesOf returns the pod's addresses.
func addressesOf(pair podlink.Pair) []netip.Addr {
	addresses := make([]netip.Addr, 0, len(pair.Pod.Addresses))
	for _, p := range pair.Pod.Addresses {
		addresses = append(addresses, p.Addr())
	}
	return addresses
}

// checkNetns refuses a path that is no network namespace, and the node's own.
func checkNetns(path string) error {
	if err := ns.IsNSorErr(path); err != nil {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_NETNS: %v", err), "")
	}
	own, err := cnins.CheckNetNS(path)
	if err != nil {
		return err
	}
	if own {
		return types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_NETNS: %s is the node's own network namespace", path), "")
	}
	return nil
}

// extend adds the pod's link to the result of the plugins before, if there are any.
func extend(previous *current.Result, pair podlink.Pair, netns string) *current.Result {
	result := &current.Result{}
	if previous != nil {
		result = previous
	}
	result.CNIVersion = current.ImplementedSpecVersion
	podEnd := len(result.Interfaces) + 1
	result.Interfaces = append(result.Interfaces,
		&current.Interface{Name: pair.Host.Name, Mac: net.HardwareAddr(pair.Host.MAC[:]).String(), Mtu: pair.MTU},
		&current.Interface{Name: pair.Pod.Name, Mac: net.HardwareAddr(pair.Pod.MAC[:]).String(), Mtu: pair.MTU, Sandbox: netns})
	for i, p := range pair.Pod.Addresses {
		// Each address has the route, and so the gateway, of the same index.
		route := pair.Pod.Routes[i]
		gateway := net.IP(route.Via.AsSlice())
		result.IPs = append(result.IPs, &current.IPConfig{Interface: new(podEnd), Address: ipNet(p), Gateway: gateway})
		result.Routes = append(result.Routes, &types.Route{Dst: ipNet(route.Destination), GW: gateway})
	}
	return result
}

// ipNet converts a prefix for a CNI result.
func ipNet(p netip.Prefix) net.IPNet {
	return net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}
