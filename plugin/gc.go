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
// runtime names none at all, because the key is missing, nothing is removed. What an ADD or a DEL works on is left to it.
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
	valid := make(map[string]bool, len(*conf.ValidAttachments))
	for _, a := range *conf.ValidAttachments {
		valid[podlink.HostName(a.ContainerID, a.IfName)] = true
	}
	locks := inflight.In(conf.RunDir)
	remains, err := findRemains(ctx, locks, leases, valid)
	errs := []error{err}
	for _, r := range remains {
		errs = append(errs, r.remove(ctx, conf, locks, leases))
	}
	return errors.Join(append(errs, conf.sweep(ctx, leases))...)
}

// remain is what an attachment has that is not valid: a lease or a part of one, and perhaps a link; or a link alone, of which
// nobody knows whose it was.
type remain struct {
	link  string
	owner *ipam.Owner
}

// findRemains returns what there is of attachments that are not valid, at one moment, without those that somebody works on. What cannot
// be read is in the error, and does not hide the rest.
func findRemains(ctx context.Context, locks inflight.Locks, leases *ipam.Store, valid map[string]bool) ([]remain, error) {
	var found []remain
	err := locks.Pause(ctx, func(busy func(string) (bool, error)) error {
		owners, ownersErr := leases.Owners()
		names, linksErr := podlink.Links()
		errs := []error{ownersErr, linksErr}
		seen := make(map[string]bool, len(owners))
		add := func(r remain) {
			if valid[r.link] || seen[r.link] {
				return
			}
			seen[r.link] = true
			working, busyErr := busy(r.link)
			errs = append(errs, busyErr)
			if busyErr == nil && !working {
				found = append(found, r)
			}
		}
		for i, o := range owners {
			add(remain{podlink.HostName(o.ContainerID, o.Interface), &owners[i]})
		}
		for _, name := range names {
			add(remain{link: name})
		}
		return errors.Join(errs...)
	})
	return found, err
}

// remove takes it away, unless somebody has begun to work on it meanwhile.
//
// What other plugins of the conflist have made goes first: a runtime that knows nothing of the attachment calls no DEL of theirs, portmap and
// bandwidth have no GC, and a port of the node would lead to whoever has the address next. The daemon knows how; without it the lease stays.
func (r remain) remove(ctx context.Context, conf *config, locks inflight.Locks, leases *ipam.Store) error {
	end, ok, err := locks.Try(r.link)
	if err != nil || !ok {
		return err
	}
	defer end()
	if r.owner == nil {
		return podlink.Detach(r.link)
	}
	if err = retire(leases, r.owner.ContainerID, r.owner.Interface); err != nil {
		return err
	}
	if _, err = conf.ask(ctx, agentapi.OpRemoveChained, &agentapi.Pod{ContainerID: r.owner.ContainerID}); err != nil {
		return fmt.Errorf("removing what other plugins have made for the container %s, whose lease stays until then: %w", r.owner.ContainerID, err)
	}
	return free(leases, r.owner.ContainerID, r.owner.Interface)
}
