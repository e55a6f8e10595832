package main

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// errTaken says that another process holds the node.
var errTaken = errors.New("another warrend runs on this node")

// takeoverPatience is how long a lock may outlive its daemon. One that is killed while it starts a program leaves a process that holds
// the lock until it runs that program.
const takeoverPatience = time.Second

// lock takes the node for this process, so that no second daemon takes over the socket of the first and undoes its work, and
// no cleanup works against a daemon. It is a lock on the run directory, which the kernel gives back when the process
// ends; unlock is for those who go on.
func (p *paths) lock() (unlock func() error, err error) {
	dir, err := os.Open(p.runDir)
	if err != nil {
		return nil, fmt.Errorf("locking the run directory: %w", err)
	}
	err = flock(dir)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%w (%s is locked)", errTaken, p.runDir)
	}
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return dir.Close, nil
}

// flock locks a file that another process may hold for a moment.
func flock(file *os.File) error {
	patience := time.NewTimer(takeoverPatience)
	defer patience.Stop()
	again := time.NewTicker(takeoverPatience / 100)
	defer again.Stop()
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return err
		}
		select {
		case <-again.C:
		case <-patience.C:
			return err
		}
	}
}
