package wgdevice

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/wgctrl"
	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/mesh"
)

// Types of links, as package netlink names them.
const (
	typeWireGuard = "wireguard"
	typeTUN       = "tuntap"
)

// probeLink is made for a moment to ask whether the kernel has WireGuard.
const probeLink = "warren-probe"

// uapiSocket is where the user-space tunnel is configured; wgctrl knows no other directory.
const uapiSocket = "/var/run/wireguard/" + mesh.Link + ".sock"

// tunnelPatience bounds the wait for an answer of the user-space tunnel.
const tunnelPatience = 2 * time.Second

// kernel is a netlink handle in one network namespace.
type kernel struct {
	netlinksafe.Handle
}

func openKernel() (*kernel, error) {
	h, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	return &kernel{h}, nil
}

// hasWireGuard asks the kernel for a WireGuard link, which also loads the module where there is one.
func (k *kernel) hasWireGuard() (bool, error) {
	probe := newLink(probeLink)
	err := k.LinkAdd(probe)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return false, nil
	}
	if err != nil && !errors.Is(err, unix.EEXIST) { // exists: the tunnel's process asks at this moment, or died while it asked
		return false, fmt.Errorf("asking the kernel for WireGuard: %w", err)
	}
	if err = k.LinkDel(probe); err != nil && !isMissing(err) {
		return false, fmt.Errorf("deleting link %s: %w", probeLink, err)
	}
	return true, nil
}

// link returns warren0, or nil where there is none. A link of that name that we would never make is an error.
func (k *kernel) link() (netlink.Link, error) {
	link, err := k.LinkByName(mesh.Link)
	switch {
	case isMissing(err):
		return nil, nil //nolint:nilnil // no link is an answer, not a failure
	case err != nil:
		return nil, fmt.Errorf("reading link %s: %w", mesh.Link, err)
	case link.Type() != typeWireGuard && link.Type() != typeTUN:
		return nil, fmt.Errorf("link %s is of type %s and not Warren's: rename or delete it", mesh.Link, link.Type())
	}
	return link, nil
}

// deleteLink removes warren0 where it is there.
func (k *kernel) deleteLink(changes *Changes) error {
	link, err := k.link()
	if err != nil || link == nil {
		return err
	}
	if err = k.LinkDel(link); err != nil && !isMissing(err) {
		return fmt.Errorf("deleting link %s: %w", mesh.Link, err)
	}
	changes.Links++
	return nil
}

// ensureLink returns warren0 with the type that the mode asks for and with the wanted MTU.
func (d *Device) ensureLink(k *kernel, mode Mode, mtu int, changes *Changes) (netlink.Link, error) {
	link, err := k.link()
	if err != nil {
		return nil, err
	}
	wanted := typeWireGuard
	if mode == ModeUserspace {
		wanted = typeTUN
	}
	if link != nil && link.Type() != wanted {
		d.log.Info("deleting link of another mode", "link", mesh.Link, "type", link.Type(), "mode", string(mode))
		if err = k.deleteLink(changes); err != nil {
			return nil, err
		}
		link = nil
	}
	if link == nil {
		if mode == ModeUserspace {
			d.chooseAgain()
			return nil, fmt.Errorf("looking for link %s, which the user-space tunnel makes: %w", mesh.Link, noTunnel(d.asked))
		}
		return d.makeLink(k, mtu, changes)
	}
	if link.Attrs().MTU != mtu {
		if err = k.LinkSetMTU(link, mtu); err != nil {
			return nil, fmt.Errorf("setting MTU %d on %s: %w", mtu, mesh.Link, err)
		}
		changes.Links++
	}
	return link, nil
}

// makeLink makes warren0 in the kernel.
func (d *Device) makeLink(k *kernel, mtu int, changes *Changes) (netlink.Link, error) {
	wanted := newLink(mesh.Link)
	wanted.MTU = mtu
	err := k.LinkAdd(wanted)
	if errors.Is(err, unix.EOPNOTSUPP) {
		d.chooseAgain()
		return nil, fmt.Errorf("making link %s in the kernel: %w", mesh.Link, noTunnel(d.asked))
	}
	if err != nil {
		return nil, fmt.Errorf("making link %s: %w", mesh.Link, err)
	}
	changes.Links++
	link, err := k.LinkByName(mesh.Link)
	if err != nil {
		return nil, fmt.Errorf("reading link %s: %w", mesh.Link, err)
	}
	return link, nil
}

func newLink(name string) *netlink.Wireguard {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = name
	return &netlink.Wireguard{LinkAttrs: attrs}
}

// raise sets the link up.
func (k *kernel) raise(link netlink.Link, changes *Changes) error {
	if link.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	// A TUN device would otherwise make itself a link-local address and send router solicitations into the tunnel.
	const addrGenModeNone = 1
	if err := k.LinkSetIP6AddrGenMode(link, addrGenModeNone); err != nil && !errors.Is(err, unix.EAFNOSUPPORT) {
		return fmt.Errorf("keeping link-local addresses from %s: %w", mesh.Link, err)
	}
	if err := k.LinkSetUp(link); err != nil {
		return fmt.Errorf("setting %s up: %w", mesh.Link, err)
	}
	changes.Links++
	return nil
}

// addAddresses adds the wanted addresses and returns those that are not wanted any more.
func (k *kernel) addAddresses(link netlink.Link, wanted []netip.Prefix, changes *Changes) ([]netip.Prefix, error) {
	list, err := netlinksafe.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("listing addresses of %s: %w", mesh.Link, err)
	}
	var have, stale []netip.Prefix
	var errs []error
	for _, a := range list {
		p := prefixOf(a.IPNet)
		have = append(have, p)
		if !slices.Contains(wanted, p) && !p.Addr().IsLinkLocalUnicast() {
			stale = append(stale, p)
		}
	}
	for _, p := range wanted {
		if slices.Contains(have, p) {
			continue
		}
		a := &netlink.Addr{IPNet: ipNet(p)}
		if p.Addr().Is6() {
			a.Flags = unix.IFA_F_NODAD
		}
		if err = k.AddrAdd(link, a); err != nil { // one family may be turned off on the node; the other goes on
			errs = append(errs, fmt.Errorf("adding address %s to %s: %w", p, mesh.Link, err))
			continue
		}
		changes.Links++
	}
	return stale, errors.Join(errs...)
}

// deleteAddresses removes addresses from the link.
func (k *kernel) deleteAddresses(link netlink.Link, stale []netip.Prefix, changes *Changes) error {
	for _, p := range stale {
		if err := k.AddrDel(link, &netlink.Addr{IPNet: ipNet(p)}); err != nil {
			return fmt.Errorf("deleting address %s from %s: %w", p, mesh.Link, err)
		}
		changes.Links++
	}
	return nil
}

// openWireGuard returns a client for the device. A user-space tunnel that does not answer is ErrNoTunnel: it is asked with a
// time limit first, because wgctrl would wait for a hung one without end.
func openWireGuard(ctx context.Context, mode Mode) (*wgctrl.Client, error) {
	if mode == ModeUserspace {
		if err := askTunnel(ctx); err != nil {
			return nil, fmt.Errorf("%w that answers: asking the user-space tunnel at %s: %w; if it lasts, look at the log of its pod, and delete that pod, "+
				"or apply manifests/userspace-tunnel.yaml where it has none", ErrNoTunnel, uapiSocket, err)
		}
	}
	client, err := wgctrl.New()
	if err != nil {
		return nil, fmt.Errorf("opening WireGuard's control: %w", err)
	}
	return client, nil
}

// readDevice returns the device with all its peers.
func readDevice(client *wgctrl.Client) (*wgtypes.Device, error) {
	device, err := client.Device(mesh.Link)
	if err != nil {
		return nil, fmt.Errorf("reading WireGuard on %s: %w", mesh.Link, err)
	}
	return device, nil
}

// askTunnel lets the tunnel change nothing and waits for its answer, which costs the same however many peers it has.
func askTunnel(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, tunnelPatience)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", uapiSocket)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }()
	deadline, _ := ctx.Deadline()
	if err = conn.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err = conn.Write([]byte("set=1\n\n")); err != nil {
		return err
	}
	_, err = conn.Read(make([]byte, 1))
	return err
}

// isMissing says whether an error means that the link is not there.
func isMissing(err error) bool {
	var notFound netlink.LinkNotFoundError
	return errors.As(err, &notFound) || errors.Is(err, unix.ENODEV) || errors.Is(err, os.ErrNotExist)
}
