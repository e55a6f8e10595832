package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/gate"
	"github.com/warren-cni/warren/pkg/inflight"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/podlink"
)

// How often the collector looks, and how long nothing may be left of an attachment before its lease is taken away.
const (
	collectEvery = 15 * time.Second
	goneFor      = 60 * time.Second
)

// collector ends the leases of attachments that are gone and that no runtime deletes: those that crashed or lost their state, and
// that know no GC (containerd before 2.0).
//
// An attachment is gone when its link and its network namespace are. The kernel deletes a link with the namespace, so without one there
// is no network; but somebody may have deleted the link alone, and then the pod that runs is still known to the whole cluster by its
// address, which nobody else must get. So there has to be a sign besides, one of these: the path of the namespace is gone, in a directory
// in which the daemon sees that of another attachment, which stands; the pod does not exist any more, or has finished; the pod has another
// attachment that stands, because a pod has one sandbox at a time.
//
// All of it must be so for goneFor without a break, as this process has seen it.
type collector struct {
	leases *ipam.Store
	locks  inflight.Locks
	log    *slog.Logger
	clock  func() time.Time
	// links returns the names of the host links that stand.
	links func() ([]string, error)
	// exists says whether a pod exists and has not finished; true where that is not known.
	exists func(ipam.Owner) bool
	// removeChained takes away what other plugins have made for containers: ports of the node, which would lead to whoever has their
	// addresses next, and what limited their bandwidth.
	removeChained func(ctx context.Context, containers ...string) error
	// gone says since when attachments are gone.
	gone map[cluster.Holder]time.Time
}

// run collects until the context ends.
func (c *collector) run(ctx context.Context) {
	look := time.NewTicker(collectEvery)
	defer look.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			c.collect(ctx)
		}
	}
}

// collect looks once.
func (c *collector) collect(ctx context.Context) {
	owners, err := c.leases.Owners() // what cannot be read is a problem of the next full step
	if err != nil && len(owners) == 0 {
		return
	}
	links, err := c.standing()
	if err != nil {
		c.log.Warn("looking for leases that nobody holds any more", "error", err)
		return
	}
	now := c.clock()
	gone := make(map[cluster.Holder]time.Time)
	seen := signs{links: links, exists: c.exists, pods: podsOf(owners, links), visible: visibleOf(owners, links)}
	for _, o := range owners {
		if !seen.gone(o) {
			continue
		}
		holder := holderOf(o)
		since, before := c.gone[holder]
		if !before {
			since = now
		}
		gone[holder] = since
		if now.Sub(since) < goneFor {
			continue
		}
		if err = c.release(ctx, o); err != nil {
			c.log.Warn("ending the lease of an attachment that is gone", "pod", o.Namespace+"/"+o.Name, "container", o.ContainerID, "error", err)
		}
	}
	c.gone = gone
}

// release ends a lease as DEL does, and leaves its connections to the sweeper. Where somebody works on the attachment, or the link is
// back, it is none that is gone.
func (c *collector) release(ctx context.Context, o ipam.Owner) error {
	link := podlink.HostName(o.ContainerID, o.Interface)
	end, ok, err := c.locks.Try(link)
	if err != nil || !ok {
		return err
	}
	defer end()
	links, err := c.standing()
	if err != nil || links[link] {
		return err
	}
	addresses, err := c.leases.Held(o.ContainerID, o.Interface)
	if err != nil {
		return err
	}
	if err = gate.CloseBehind(addresses); err != nil {
		return err
	}
	if err = c.removeChained(ctx, o.ContainerID); err != nil {
		return err
	}
	if addresses, err = c.leases.Release(o.ContainerID, o.Interface); err != nil {
		return err
	}
	if err = gate.CloseBehind(addresses); err != nil { // an audit may have opened it again, until the lease was gone
		return err
	}
	c.log.Info("ended the lease of an attachment that is gone and was not deleted",
		"pod", o.Namespace+"/"+o.Name, "container", o.ContainerID, "interface", o.Interface, "addresses", addresses)
	return nil
}

// standing returns the host links that stand.
func (c *collector) standing() (map[string]bool, error) {
	names, err := c.links()
	links := make(map[string]bool, len(names))
	for _, name := range names {
		links[name] = true
	}
	return links, err
}

// signs are what one look sees.
type signs struct {
	links  map[string]bool
	exists func(ipam.Owner) bool
	// pods are the interfaces of pods that have a link.
	pods map[ipam.Owner]bool
	// visible are the directories in which network namespaces are seen.
	visible map[string]bool
}

// gone says whether an attachment is gone.
func (s signs) gone(o ipam.Owner) bool {
	if s.links[podlink.HostName(o.ContainerID, o.Interface)] || isNamespace(o.Netns) {
		return false
	}
	return s.pods[podOf(o)] || s.lost(o.Netns) || !s.exists(o)
}

// lost says whether nothing is at the path of a network namespace, and would be if it existed.
func (s signs) lost(path string) bool {
	return s.visible[filepath.Dir(path)] && isGone(path)
}

// visibleOf returns the directories in which the namespace of an attachment that stands is seen, by its name alone: what is mounted there
// after a container has started does not show in it.
func visibleOf(owners []ipam.Owner, links map[string]bool) map[string]bool {
	visible := map[string]bool{}
	for _, o := range owners {
		if o.Netns != "" && links[podlink.HostName(o.ContainerID, o.Interface)] && !isGone(o.Netns) {
			visible[filepath.Dir(o.Netns)] = true
		}
	}
	return visible
}

// isGone says whether nothing is at a path.
func isGone(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, fs.ErrNotExist)
}

// podsOf returns the interfaces of pods that have a link.
func podsOf(owners []ipam.Owner, links map[string]bool) map[ipam.Owner]bool {
	pods := make(map[ipam.Owner]bool)
	for _, o := range owners {
		if links[podlink.HostName(o.ContainerID, o.Interface)] {
			pods[podOf(o)] = true
		}
	}
	return pods
}

// podOf is the owner without the container.
func podOf(o ipam.Owner) ipam.Owner {
	o.ContainerID, o.Netns = "", ""
	return o
}

// holderOf is the owner as what holds an address.
func holderOf(o ipam.Owner) cluster.Holder {
	return cluster.Holder{ContainerID: o.ContainerID, Interface: o.Interface}
}

// isNamespace says whether a namespace is at a path.
func isNamespace(path string) bool {
	var found unix.Statfs_t
	return unix.Statfs(path, &found) == nil && found.Type == unix.NSFS_MAGIC
}
