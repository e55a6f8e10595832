package kube

import (
	"fmt"
	"net/netip"
	"strings"

	"k8s.io/apimachinery/pkg/util/validation/field"

	"github.com/warren-cni/warren/pkg/cluster"
)

// findings collects the problems of one object while it is converted.
type findings struct {
	code   string
	object string
	remedy string
	list   []cluster.Problem
}

// add reports a field; the message says what is wrong and what follows from it.
func (f *findings) add(path *field.Path, format string, args ...any) {
	f.list = append(f.list, cluster.Problem{
		Code: f.code, Object: f.object, Field: path.String(), Message: shorten(fmt.Sprintf(format, args...)), Remedy: f.remedy,
	})
}

// What is kept of a message's beginning and of its end, in bytes.
const (
	messageHead = 300
	messageTail = 150
)

// shorten cuts the middle out of a long message: it may quote an annotation of 256 KiB, and stands in every node's status and log.
func shorten(message string) string {
	if len(message) <= messageHead+messageTail {
		return message
	}
	return strings.ToValidUTF8(message[:messageHead]+" [...] "+message[len(message)-messageTail:], "")
}

// parseAddr reads an address, unwrapping IPv4 in IPv6. Zones mean nothing outside of their host.
func parseAddr(text string) (netip.Addr, error) {
	addr, err := netip.ParseAddr(text)
	if err != nil {
		return netip.Addr{}, err
	}
	if addr.Zone() != "" {
		return netip.Addr{}, fmt.Errorf("the address %s has a zone", text)
	}
	return addr.Unmap(), nil
}

// parsePrefix reads a prefix and clears its host bits, which Kubernetes accepts and ignores too. IPv4 in IPv6 is refused:
// its meaning differs from one program to the next.
func parsePrefix(text string) (netip.Prefix, error) {
	prefix, err := netip.ParsePrefix(text)
	if err != nil {
		return netip.Prefix{}, err
	}
	if prefix.Addr().Is4In6() {
		return netip.Prefix{}, fmt.Errorf("the prefix %s is IPv4 inside IPv6", text)
	}
	return prefix.Masked(), nil
}
