package podlink

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/nlbatch"
)

// trashGroup is the group of the devices that wait to be deleted. It is the only group that is ever deleted as a whole, and must never
// become 0: in that is every device of the node.
const trashGroup = 0x77726e00

// trashPrefix begins the name of a host end that waits to be deleted, which ends with its index. No HostName begins like this, and
// like those it is matched by the rules for "wrn+".
const trashPrefix = Prefix + "-"

// trashName is the name of the device of that index once it waits to be deleted.
func trashName(index int32) string { return trashPrefix + strconv.Itoa(int(index)) }

// Detach takes the pair with a host end of that name out of service. When it returns no packet passes the pair any more, its routes and
// neighbours are gone on the node and its name is free; Sweep deletes what is left. It is no error if there is none.
//
// To delete a pair costs the kernel tens of milliseconds of waiting, and hardly more for many at once.
func Detach(hostName string) error {
	r, err := openRtnl()
	if err != nil {
		return err
	}
	defer r.Close()
	index, err := r.index(hostName)
	if err != nil || index == 0 {
		return err
	}
	err = r.Do(unlessGone("setting "+hostName+" down", setUp(index, false)))
	if err == nil { // else it keeps the name by which the next DEL finds it
		err = r.Do(unlessGone("renaming "+hostName+" to "+trashName(index), link(unix.RTM_SETLINK, index,
			nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(trashName(index))), inTrash())))
	}
	if err != nil {
		return fmt.Errorf("taking the device %s out of service: %w", hostName, err)
	}
	return nil
}

// inTrash is the attribute of the group.
func inTrash() *nl.RtAttr { return nl.NewRtAttr(unix.IFLA_GROUP, nl.Uint32Attr(trashGroup)) }

// Sweep deletes all pairs that Detach has taken out of service, together.
func Sweep() error {
	links, err := listLinks()
	if err != nil {
		return err
	}
	r, err := openRtnl()
	if err != nil {
		return err
	}
	defer r.Close()
	var trash []netlink.Link
	var astray []nlbatch.Step
	foreign := false
	for _, l := range links {
		a := l.Attrs()
		ours := l.Type() == "veth" && strings.HasPrefix(a.Name, trashPrefix)
		switch {
		case ours && a.Group != trashGroup: // somebody has put it elsewhere
			astray = append(astray, unlessGone("regrouping "+a.Name, link(unix.RTM_SETLINK, indexOf(l), inTrash())))
		case !ours && a.Group == trashGroup:
			foreign = true
		}
		if ours {
			trash = append(trash, l)
		}
	}
	switch {
	case len(trash) == 0:
		return nil
	case foreign: // something that is not ours is in the group
		return r.deleteEach(trash)
	}
	// It answers ENODEV where another has deleted them meanwhile.
	return r.Do(append(astray, unlessGone("deleting the devices of ended pods", link(unix.RTM_DELLINK, 0, inTrash())))...)
}

// deleteEach deletes devices one by one.
func (r rtnl) deleteEach(links []netlink.Link) error {
	steps := make([]nlbatch.Step, 0, len(links))
	for _, l := range links {
		steps = append(steps, unlessGone("deleting "+l.Attrs().Name, link(unix.RTM_DELLINK, indexOf(l))))
	}
	return r.Do(steps...)
}

// indexOf returns a device's index as messages have it.
func indexOf(l netlink.Link) int32 { return int32(l.Attrs().Index) } //nolint:gosec // the kernel's are of this size

// reclaim frees a name in a pod's namespace that a pair has which is out of service and not yet deleted: the runtime attaches the
// pod anew. It says whether it did.
func reclaim(pod ns.NetNS, name string) (bool, error) {
	var old netlink.Link
	err := pod.Do(func(ns.NetNS) (err error) {
		old, err = netlinksafe.LinkByName(name)
		return err
	})
	if err != nil || old.Type() != "veth" {
		return false, err
	}
	host, err := netlink.LinkByIndex(old.Attrs().ParentIndex)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return false, nil
	}
	id, idErr := netlink.GetNetNsIdByFd(int(pod.Fd()))
	if err = errors.Join(err, idErr); err != nil {
		return false, err
	}
	// An index says nothing across namespaces: the other end of the one that goes must be this one.
	a := host.Attrs()
	if a.Name != trashName(indexOf(host)) || a.NetNsID != id || a.ParentIndex != old.Attrs().Index {
		return false, nil
	}
	r, err := openRtnl()
	if err != nil {
		return false, err
	}
	defer r.Close()
	return true, r.deleteEach([]netlink.Link{host})
}

// Links returns the names of all host ends that are in service.
func Links() ([]string, error) {
	links, err := listLinks()
	if err != nil {
		return nil, err
	}
	var names []string
	for _, l := range links {
		name := l.Attrs().Name
		if l.Type() == "veth" && strings.HasPrefix(name, Prefix) && !strings.HasPrefix(name, trashPrefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

// RemoveAll deletes the pairs of all pods, and goes on after an error.
func RemoveAll() error {
	names, err := Links()
	errs := []error{err}
	for _, name := range names {
		errs = append(errs, Detach(name))
	}
	return errors.Join(append(errs, Sweep())...)
}

// listLinks returns all devices.
func listLinks() ([]netlink.Link, error) {
	h, err := netlinksafe.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("opening netlink: %w", err)
	}
	defer h.Close()
	links, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	return links, nil
}
