package capture

import (
	"fmt"
	"net"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/podlink"
)

// links knows by their numbers the links that a packet was seen on: nil for those inside the node.
type links struct {
	handle netlinksafe.Handle
	seen   map[int]*Link
}

func newLinks(handle netlinksafe.Handle) *links {
	return &links{handle: handle, seen: map[int]*Link{}}
}

// inside returns the numbers of the links inside the node as they are now, and takes note of all others.
func (l *links) inside() ([]uint32, error) {
	list, err := l.handle.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing links: %w", err)
	}
	var numbers []uint32
	for _, link := range list {
		index := link.Attrs().Index
		l.seen[index] = uplink(link)
		if l.seen[index] == nil {
			numbers = append(numbers, uint32(index)) //nolint:gosec // the kernel's own number, 32 bits there
		}
	}
	return numbers, nil
}

// find returns the link of a packet, nil where it is one inside the node; known is false for one that is gone.
func (l *links) find(index int) (found *Link, known bool) {
	if found, known = l.seen[index]; known {
		return found, true
	}
	link, err := l.handle.LinkByIndex(index)
	if err != nil {
		return nil, false
	}
	l.seen[index] = uplink(link)
	return l.seen[index], true
}

// uplink returns an empty account of a link by which packets leave the node, and nil for one inside it. An IFB is where the
// bandwidth plugin shapes what a pod sends, before the node has judged it.
func uplink(link netlink.Link) *Link {
	a := link.Attrs()
	if a.Flags&net.FlagLoopback != 0 || a.Name == mesh.Link || strings.HasPrefix(a.Name, podlink.Prefix) || link.Type() == "ifb" {
		return nil
	}
	return &Link{Name: a.Name}
}
