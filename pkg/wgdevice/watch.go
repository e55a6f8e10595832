package wgdevice

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/mesh"
)

// answerCheck is how often a tunnel that is starting is asked whether it answers.
const answerCheck = 2 * time.Millisecond

// WatchTunnel calls notify whenever a user-space tunnel has begun to answer, or the kernel's was deleted, until the context ends. Such a
// tunnel has just started and knows neither key nor peers, and the kernel's is to be made again: the next Apply mends both.
func WatchTunnel(ctx context.Context, notify func()) error {
	dir := filepath.Dir(uapiSocket)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the directory of the tunnel's socket: %w", err)
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching for the tunnel: %w", err)
	}
	defer func() { _ = watcher.Close() }()
	if err = watcher.Add(dir); err != nil {
		return fmt.Errorf("watching %s for the tunnel: %w", dir, err)
	}
	done := make(chan struct{})
	defer close(done)
	links, err := followLinks(done)
	if err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return nil
		case event := <-watcher.Events:
			if event.Has(fsnotify.Create) && event.Name == uapiSocket && awaitTunnel(ctx) {
				notify()
			}
		case err = <-watcher.Errors:
			return fmt.Errorf("watching for the tunnel: %w", err)
		case update, open := <-links:
			if !open { // there were more news than fit; among those lost may be this link's
				if links, err = followLinks(done); err != nil {
					return err
				}
				notify()
			} else if update.Header.Type == unix.RTM_DELLINK && update.Attrs().Name == mesh.Link && update.Type() == typeWireGuard {
				notify()
			}
		}
	}
}

// followLinks returns the kernel's news of links, until done is closed or they get lost.
func followLinks(done <-chan struct{}) (<-chan netlink.LinkUpdate, error) {
	updates := make(chan netlink.LinkUpdate)
	if err := netlink.LinkSubscribe(updates, done); err != nil {
		return nil, fmt.Errorf("following links: %w", err)
	}
	return updates, nil
}

// awaitTunnel says whether the tunnel whose socket was made just now answers, for which it needs a moment more.
func awaitTunnel(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, tunnelPatience)
	defer cancel()
	again := time.NewTicker(answerCheck)
	defer again.Stop()
	for askTunnel(ctx) != nil {
		select {
		case <-ctx.Done():
			return false
		case <-again.C:
		}
	}
	return true
}
