package ipam

import (
	"errors"
	"fmt"
	"io/fs"
	"time"

	"golang.org/x/sys/unix"
)

// lockFile is the file whose lock is the directory's.
const lockFile = ".lock"

// lockPatience is how long the lock is waited for. Who works with the leases holds it for much less than a second.
const lockPatience = 10 * time.Second

// lockPause is how long the lock is waited for before it is tried again. The kernel knows no wait for it that ends.
const lockPause = 200 * time.Microsecond

// ErrBusy says that another process holds the lock of the leases for too long.
var ErrBusy = errors.New("another process holds the lock")

// lock is the directory's lock, held: the descriptor of its file.
type lock int

// lock takes the directory's lock, which the kernel gives back when the process dies. The error is ErrBusy where another does not give it
// back for 10 s.
func (s *Store) lock() (lock, error) {
	fd, err := s.openLock()
	if isForeign(err) {
		fd, err = s.replaceLock()
	}
	if err != nil {
		return 0, fmt.Errorf("locking leases: %w", err)
	}
	l := lock(fd)
	if err = s.flock(fd, lockFile); err != nil {
		l.unlock()
		return 0, fmt.Errorf("locking leases: %w", err)
	}
	return l, nil
}

// flock locks a file of that name which is open, or the directory. The error is ErrBusy where another holds it for too long.
func (s *Store) flock(fd int, name string) error {
	try := func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) }
	err := again(try)
	if !errors.Is(err, unix.EWOULDBLOCK) {
		return err
	}
	giveUp, retry := time.After(lockPatience), time.NewTicker(lockPause)
	defer retry.Stop()
	for errors.Is(err, unix.EWOULDBLOCK) {
		select {
		case <-giveUp:
			return fmt.Errorf("%w on %s, and has for %s: the daemon, the plugin for another pod, or none of ours; "+
				"`lslocks` says which, end it if it hangs", ErrBusy, s.path(name), lockPatience)
		case <-retry.C:
			err = again(try)
		}
	}
	return err
}

// openLock opens the lock's file, which is made where there is none.
func (s *Store) openLock() (fd int, err error) {
	return open(s.path(lockFile), unix.O_RDWR|unix.O_CREAT)
}

// replaceLock sets aside what is in the place of the lock's file and is none, and opens a new one. Who else does so meanwhile has to wait,
// and to look again: the file that another has just made must stay.
func (s *Store) replaceLock() (fd int, err error) {
	dir, err := open(s.dir, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return 0, err
	}
	defer func() { _ = unix.Close(dir) }()
	if err = s.flock(dir, "."); err != nil {
		return 0, err
	}
	if fd, err = s.openLock(); !isForeign(err) {
		return fd, err
	}
	if err = s.setAside(lockFile); err != nil {
		return 0, err
	}
	return s.openLock()
}

// isForeign says whether a file could not be opened because it is a directory, a link or a socket, and so none of ours.
func isForeign(err error) bool {
	return errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO)
}

// unlock gives the lock back.
func (l lock) unlock() { _ = unix.Close(int(l)) } // that could not lose anything

// open opens a file that is no link, without what os.OpenFile does for files that can be waited for.
func open(path string, flags int) (fd int, err error) { return openAt(unix.AT_FDCWD, path, flags) }

// openAt opens a file as open does, in a directory that is open.
func openAt(dir int, path string, flags int) (fd int, err error) {
	err = again(func() (err error) {
		fd, err = unix.Openat(dir, path, flags|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0o600)
		return err
	})
	if err != nil {
		return 0, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	return fd, nil
}

// again repeats a system call that a signal interrupted.
func again(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
