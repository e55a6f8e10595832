package nodenet

import (
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/preflight"
)

// Apart calls a function in a network namespace of its own, which is gone afterwards with all that the function made in it. Goroutines
// that the function starts are not in there. It needs CAP_SYS_ADMIN.
func Apart(do func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine, and the namespace with the thread
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err != nil {
			err = fmt.Errorf("making a network namespace to try in: %w", err)
		} else {
			err = do()
		}
		result <- err
	}()
	return <-result
}

// Forwarding tells in which families the node forwards packets.
func Forwarding(sysctls string) (preflight.Forwarding, error) {
	v4, err4 := get(sysctls, "net/ipv4/ip_forward")
	v6, err6 := get(sysctls, "net/ipv6/conf/all/forwarding")
	if errors.Is(err6, fs.ErrNotExist) { // a kernel without IPv6
		err6 = nil
	}
	return preflight.Forwarding{IPv4: v4 == "1", IPv6: v6 != "" && v6 != "0"}, errors.Join(err4, err6)
}

// Links returns all links with their addresses.
func Links() ([]preflight.Link, error) {
	list, err := netlinksafe.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	var links []preflight.Link
	for _, l := range list {
		a := l.Attrs()
		link := preflight.Link{Name: a.Name, Type: l.Type(), MTU: a.MTU, Up: a.RawFlags&unix.IFF_UP != 0}
		addresses, err := netlinksafe.AddrList(l, netlink.FAMILY_ALL)
		if err != nil {
			return nil, fmt.Errorf("listing addresses of %s: %w", a.Name, err)
		}
		for _, address := range addresses {
			if p, ok := prefixOf(address.IP, address.Mask); ok {
				link.Addresses = append(link.Addresses, p)
			}
		}
		links = append(links, link)
	}
	return links, nil
}

// Routes returns the routes of the main table that lead out of a link.
func Routes() ([]preflight.Route, error) {
	links, err := netlinksafe.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	var routes []preflight.Route
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlinksafe.RouteList(nil, family)
		if err != nil {
			return nil, fmt.Errorf("listing routes: %w", err)
		}
		for i := range list {
			if list[i].Type != unix.RTN_UNICAST { // a route that leads nowhere is on lo in IPv6
				continue
			}
			destination := netip.PrefixFrom(netip.IPv4Unspecified(), 0)
			if family == netlink.FAMILY_V6 {
				destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
			}
			if list[i].Dst != nil {
				destination, _ = prefixOf(list[i].Dst.IP, list[i].Dst.Mask)
			}
			for _, index := range linksOf(&list[i]) {
				if names[index] != "" {
					routes = append(routes, preflight.Route{Destination: destination, Link: names[index], Metric: list[i].Priority})
				}
			}
		}
	}
	return routes, nil
}

func prefixOf(ip, mask []byte) (netip.Prefix, bool) {
	address, ok := netip.AddrFromSlice(ip)
	ones := 0
	for _, b := range mask {
		ones += bits.OnesCount8(b)
	}
	return netip.PrefixFrom(address.Unmap(), ones), ok
}

// Sockets returns the UDP sockets on a port in the network namespace of the calling thread, with the program that has each, where
// processes can be seen below proc, /proc outside of tests.
func Sockets(port uint16, proc string) ([]preflight.Socket, error) {
	var sockets []preflight.Socket
	inodes := map[string]int{}
	for _, name := range []string{"udp", "udp6"} {
		text, err := os.ReadFile("/proc/thread-self/net/" + name)
		if errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("looking for UDP sockets: %w", err)
		}
		for line := range strings.Lines(string(text)) {
			fields := strings.Fields(line)
			if len(fields) < 10 {
				continue
			}
			address, ok := parseSocket(fields[1])
			if ok && address.Port() == port {
				inodes[fields[9]] = len(sockets)
				sockets = append(sockets, preflight.Socket{Address: address})
			}
		}
	}
	if len(sockets) > 0 {
		nameHolders(proc, inodes, sockets)
	}
	return sockets, nil
}

// parseSocket reads an address as /proc/net/udp writes it: words of four bytes in the machine's order, in hexadecimal.
func parseSocket(text string) (netip.AddrPort, bool) {
	host, portText, _ := strings.Cut(text, ":")
	port, err := strconv.ParseUint(portText, 16, 16)
	words, errHost := hex.DecodeString(host)
	if err != nil || errHost != nil || len(words)%4 != 0 {
		return netip.AddrPort{}, false
	}
	for word := range slices.Chunk(words, 4) {
		slices.Reverse(word)
	}
	address, ok := netip.AddrFromSlice(words)
	return netip.AddrPortFrom(address.Unmap(), uint16(port)), ok
}

// nameHolders looks for the processes that have sockets open, as far as they can be seen.
func nameHolders(proc string, inodes map[string]int, sockets []preflight.Socket) {
	open, _ := filepath.Glob(filepath.Join(proc, "[0-9]*/fd/*")) // the pattern is good
	for _, file := range open {
		target, err := os.Readlink(file)
		if err != nil || !strings.HasPrefix(target, "socket:[") {
			continue
		}
		if i, ok := inodes[strings.Trim(target, "socket:[]")]; ok {
			process := filepath.Dir(filepath.Dir(file))
			name, _ := os.ReadFile(filepath.Join(process, "comm")) // it may have ended
			sockets[i].Holder = fmt.Sprintf("%s (process %s)", strings.TrimSpace(string(name)), filepath.Base(process))
		}
	}
}
