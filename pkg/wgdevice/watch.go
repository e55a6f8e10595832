package wgdevice

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

// answerCheck is how often a tunnel that is starting is asked whether it answers.
const answerCheck = 2 * time.Millisecond

// WatchTunnel calls notify whenever a user-space tunnel has begun to answer, until the context ends. Such a tunnel has just
// started and knows neither key nor peers: the next Apply gives them to it.
func WatchTunnel(ctx context.Context, notify func()) error {
	dir := filepath.Dir(uapiSocket)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("making the directory of the tunnel's socket: %w", err)
	}
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watching for the tunnel: %w", err)
	}
	if err = watcher.Add(dir); err != nil {
		return errors.Join(fmt.Errorf("watching %s for the tunnel: %w", dir, err), watcher.Close())
	}
	for {
		select {
		case <-ctx.Done():
			return watcher.Close()
		case event := <-watcher.Events:
			if event.Has(fsnotify.Create) && event.Name == uapiSocket && awaitTunnel(ctx) {
				notify()
			}
		case err := <-watcher.Errors:
			return errors.Join(fmt.Errorf("watching for the tunnel: %w", err), watcher.Close())
		}
	}
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
