package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/inflight"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/podlink"
)

// collect is GC: it releases every attachment that the runtime does not name as valid, and goes on after errors. Where the
// runtime names none at all, because the key is missing, nothing is removed. What an ADD or a DEL works on when this closes the door to those
// who begin is left to it, also when it ends meanwhile.
func collect(ctx context.Context, args *skel.CmdArgs) error {
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
	valid, kept := make(map[string]bool, len(*conf.ValidAttachments)), map[string]bool{}
	for _, a := range *conf.ValidAttachments {
		valid[podlink.HostName(a.ContainerID, a.IfName)] = true
		kept[a.ContainerID] = true
	}
	remains, end, err := findRemains(ctx, inflight.In(conf.RunDir), leases, valid)
	defer end()
	errs := []error{err}
	var retired []ipam.Owner
	for _, r := range remains {
		if r.owner == nil {
			errs = append(errs, podlink.Detach(r.link))
		} else if err = retire(leases, r.owner.ContainerID, r.owner.Interface); err != nil {
			errs = append(errs, err)
		} else {
			retired = append(retired, *r.owner)
		}
	}
	errs = append(errs, conf.end(ctx, leases, retired, kept), conf.sweep(ctx, leases))
	return errors.Join(errs...)
}

// remain is what an attachment has that is not valid: a lease or a part of one, and perhaps a link; or a link alone, of which
// nobody knows whose it was.
type remain struct {
	link  string
	owner *ipam.Owner
}

// findRemains returns what there is of attachments that are not valid, while nobody begins, without those that somebody worked on when the door
// was closed. Until end nobody else works on them, so that none can be deleted and added anew before it is taken away. What cannot be read is
// in the error, and does not hide the rest.
func findRemains(ctx context.Context, locks inflight.Locks, leases *ipam.Store, valid map[string]bool) (found []remain, end func(), err error) {
	end, err = locks.Pause(ctx, func(take func(string) (bool, error)) error {
		owners, ownersErr := leases.Owners()
		names, linksErr := podlink.Links()
		errs := []error{ownersErr, linksErr}
		seen := make(map[string]bool, len(owners))
		add := func(link string, owner *ipam.Owner) {
			if valid[link] || seen[link] {
				return
			}
			seen[link] = true
			ok, lockErr := take(link)
			errs = append(errs, lockErr)
			if ok {
				found = append(found, remain{link, owner})
			}
		}
		for i, o := range owners {
			add(podlink.HostName(o.ContainerID, o.Interface), &owners[i])
		}
		for _, name := range names {
			add(name, nil)
		}
		return errors.Join(errs...)
	})
	return found, end, err
}

// end frees the leases of attachments that are retired, once what other plugins of the conflist have made for their containers is gone; those
// kept have another attachment that is valid. A runtime that knows nothing of an attachment calls no DEL of theirs, portmap and bandwidth
// have no GC, and a port of the node would lead to whoever has the address next. The daemon knows how; without it the leases stay.
func (c *config) end(ctx context.Context, leases *ipam.Store, retired []ipam.Owner, kept map[string]bool) error {
	var containers []string
	for _, o := range retired {
		if !kept[o.ContainerID] {
			containers = append(containers, o.ContainerID)
		}
	}
	remove := func(containers ...string) error {
		if len(containers) == 0 {
			return nil
		}
		_, err := c.ask(ctx, agentapi.Request{Op: agentapi.OpRemoveChained, Containers: containers})
		return err
	}
	// All at once, because it takes as long for one; and one by one where that fails, because of which it is not known.
	together := remove(containers...)
	var errs []error
	for _, o := range retired {
		err := together
		if kept[o.ContainerID] {
			err = nil
		} else if err != nil && len(containers) > 1 {
			err = remove(o.ContainerID)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("removing what other plugins have made for the container %s, whose lease stays until then: %w", o.ContainerID, err))
			continue
		}
		err = free(leases, o.ContainerID, o.Interface)
		errs = append(errs, err)
		if errors.Is(err, ipam.ErrBusy) { // not once more for each of the others
			break
		}
	}
	return errors.Join(errs...)
}
