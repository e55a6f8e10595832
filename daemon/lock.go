package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// errTaken says that another process holds the node.
var errTaken = errors.New("another warrend runs on this node")

// lock takes the node for this process, so that no second daemon takes over the socket of the first and undoes its work, and
// no cleanup works against a daemon. It is a lock on the run directory, which the kernel gives back when the process
// ends; unlock is for those who go on.
func (p *paths) lock() (unlock func() error, err error) {
	dir, err := os.Open(p.runDir)
	if err != nil {
		return nil, fmt.Errorf("locking the run directory: %w", err)
	}
	err = unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("%w (%s is locked)", errTaken, p.runDir)
	}
	if err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	return dir.Close, nil
}
