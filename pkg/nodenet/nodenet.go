// Package nodenet sets up what a node needs before any pod: that it forwards packets, and keeps its own default route while
// it does. It also looks for what would lead packets round the packet filter's FORWARD hook, and at what else pkg/preflight judges.
package nodenet

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/preflight"
)

// ipvsLink is the link that kube-proxy makes in ipvs mode, on which the addresses of all Services stand.
const ipvsLink = "kube-ipvs0"

// ErrIPVS says that kube-proxy delivers Services with IPVS: what a pod sends to one is taken in as the node's own, and its
// endpoint gets it from the node, so that no rule for forwarded packets sees it.
var ErrIPVS = errors.New("kube-proxy runs in ipvs mode (there is a link " + ipvsLink + "): what pods send to Services goes round NetworkPolicies")

// CheckServices returns ErrIPVS where the link of kube-proxy's ipvs mode is in the network namespace of the calling thread.
func CheckServices() error {
	_, err := netlinksafe.LinkByName(ipvsLink)
	if _, none := errors.AsType[netlink.LinkNotFoundError](err); none {
		return nil
	}
	if err != nil {
		return fmt.Errorf("looking for link %s: %w", ipvsLink, err)
	}
	return ErrIPVS
}

// EnableForwarding turns on forwarding in both families, in the network namespace of the calling thread. sysctls is where
// the kernel's settings are, /proc/sys outside of tests and containers.
//
// A node that forwards IPv6 ignores router advertisements and drops the default route that came by one; a link that has
// such a route is told to accept them nevertheless, before forwarding is turned on.
func EnableForwarding(sysctls string) error {
	if err := keepAdvertisedRoutes(sysctls); err != nil {
		return err
	}
	if err := set(sysctls, "net/ipv4/ip_forward", "1"); err != nil {
		return err
	}
	err := set(sysctls, "net/ipv6/conf/all/forwarding", "1")
	if errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
		return nil
	}
	return err
}

// keepAdvertisedRoutes turns accept_ra=1 into 2 on the links whose default route came by router advertisement. Where it is 0 a
// program of its own (systemd-networkd, NetworkManager) takes care of that route.
func keepAdvertisedRoutes(sysctls string) error {
	links, err := Advertised(sysctls)
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.AcceptRA == "1" {
			if err := set(sysctls, acceptRA(l.Link), "2"); err != nil {
				return err
			}
		}
	}
	return nil
}

// Advertised returns the links whose IPv6 default route came by router advertisement.
func Advertised(sysctls string) ([]preflight.Advertised, error) {
	routes, err := netlinksafe.RouteList(nil, netlink.FAMILY_V6)
	if err != nil {
		return nil, fmt.Errorf("listing IPv6 routes: %w", err)
	}
	var links []preflight.Advertised
	for i := range routes {
		if routes[i].Protocol != unix.RTPROT_RA || !isDefault(routes[i].Dst) {
			continue
		}
		for _, index := range linksOf(&routes[i]) {
			link, errLink := net.InterfaceByIndex(index)
			if errLink != nil {
				return nil, fmt.Errorf("looking for the link of the IPv6 default route: %w", errLink)
			}
			value, errGet := get(sysctls, acceptRA(link.Name))
			if errGet != nil {
				return nil, errGet
			}
			links = append(links, preflight.Advertised{Link: link.Name, AcceptRA: value})
		}
	}
	return links, nil
}

// acceptRA is the setting of a link that says which router advertisements it accepts.
func acceptRA(link string) string { return filepath.Join("net/ipv6/conf", link, "accept_ra") }

// linksOf returns the indexes of a route's links, of which it has several when there are several routers.
func linksOf(r *netlink.Route) []int {
	if len(r.MultiPath) == 0 {
		return []int{r.LinkIndex}
	}
	var links []int
	for _, hop := range r.MultiPath {
		links = append(links, hop.LinkIndex)
	}
	return links
}

func isDefault(destination *net.IPNet) bool {
	if destination == nil {
		return true
	}
	ones, _ := destination.Mask.Size()
	return ones == 0
}

// set writes a setting unless it has that value already, so that a read-only /proc/sys is no error on a node that is set up.
func set(sysctls, name, value string) error {
	have, err := get(sysctls, name)
	if err != nil || have == value {
		return err
	}
	if err = os.WriteFile(filepath.Join(sysctls, name), []byte(value), 0o600); err != nil {
		return fmt.Errorf("setting %s to %s: %w", name, value, err)
	}
	return nil
}

func get(sysctls, name string) (string, error) {
	value, err := os.ReadFile(filepath.Join(sysctls, name))
	if err != nil {
		return "", fmt.Errorf("reading setting %s: %w", name, err)
	}
	return strings.TrimSpace(string(value)), nil
}
