// Package inflight keeps apart those who work on the same attachment at the same time: ADD, DEL, the garbage collection of the
// runtime, and the daemon's own.
//
// Everybody who changes an attachment holds its lock meanwhile. Locks of different attachments have nothing to do with each other, so
// that pods come and go at once. A garbage collection must take away nothing of an ADD that runs beside it, and such an ADD may end
// before the collection comes to its attachment, or while it looks what there is. So the collection closes the door to all who begin, finds
// out first who is at work behind it, then what there is, and locks what it collects, but nothing of those who were at work. Nobody ever
// waits for more than that moment, or for the end of a collection that took the own attachment.
//
// The locks are open file description locks on bytes of one file: the kernel gives them back when a process dies, however it dies, and
// nothing has to be tidied up. An attachment is known by the name of its host link.
package inflight

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// FileName is the file of the locks in the daemon's run directory.
const FileName = "attachments.lock"

// door is the byte that everybody passes who begins. Those of attachments come before it.
const door = 1 << 62

// Locks are the locks of a node's attachments.
type Locks struct{ path string }

// In returns the locks in a run directory, which has to exist when one is taken.
func In(runDir string) Locks { return Locks{filepath.Join(runDir, FileName)} }

// Begin waits until nobody else works on the attachment, and returns what ends the own work. The error is the context's where it ends
// before.
func (l Locks) Begin(ctx context.Context, link string) (end func(), err error) {
	f, err := l.open()
	if err != nil {
		return nil, err
	}
	err = f.wait(ctx, unix.F_WRLCK, byteOf(link))
	if err == nil {
		err = f.wait(ctx, unix.F_RDLCK, door)
	}
	if err == nil {
		err = f.set(unix.F_OFD_SETLK, unix.F_UNLCK, door)
	}
	if err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("waiting for others who work on the attachment of %s: %w", link, err)
	}
	return func() { _ = f.Close() }, nil
}

// Try is Begin for somebody who does not wait. ok is false where another works on the attachment.
func (l Locks) Try(link string) (end func(), ok bool, err error) {
	f, err := l.open()
	if err != nil {
		return nil, false, err
	}
	if ok, err = f.try(link); !ok {
		return nil, false, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, true, nil
}

// Pause calls do while nobody begins; who works already goes on. With take do locks an attachment; ok is false where somebody works on it, or
// did when the door had just been closed. What is taken stays locked until end, which has to be called also after an error. All of it is one
// open file.
func (l Locks) Pause(ctx context.Context, do func(take func(link string) (ok bool, err error)) error) (end func(), err error) {
	f, err := l.open()
	if err != nil {
		return func() {}, err
	}
	end = func() { _ = f.Close() }
	if err = f.wait(ctx, unix.F_WRLCK, door); err != nil {
		return end, fmt.Errorf("waiting for those who begin with an attachment: %w", err)
	}
	// Before anything else: who ends from now on was at work.
	atWork, err := f.locked(nil, span{0, door})
	if err != nil {
		return end, fmt.Errorf("finding out who works on attachments: %w", err)
	}
	err = do(func(link string) (bool, error) {
		b := byteOf(link)
		if slices.ContainsFunc(atWork, func(s span) bool { return s.from <= b && b < s.to }) {
			return false, nil
		}
		return f.try(link)
	})
	return end, errors.Join(err, f.set(unix.F_OFD_SETLK, unix.F_UNLCK, door))
}

// span are the bytes from one up to another, which is not among them.
type span struct{ from, to int64 }

// locked adds to found what others have locked of a span. The kernel names one lock of it, in no order; what is left on both sides is asked for
// once more.
func (f file) locked(found []span, within span) ([]span, error) {
	if within.from >= within.to {
		return found, nil
	}
	lock := unix.Flock_t{Type: unix.F_WRLCK, Whence: io.SeekStart, Start: within.from, Len: within.to - within.from}
	err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &lock)
	if err != nil || lock.Type == unix.F_UNLCK {
		return found, err
	}
	one := span{lock.Start, lock.Start + lock.Len}
	if lock.Len == 0 { // up to the end
		one.to = within.to
	}
	found, err = f.locked(append(found, one), span{within.from, one.from})
	if err != nil {
		return nil, err
	}
	return f.locked(found, span{one.to, within.to})
}

// file is the file of the locks, opened once for each who locks: the locks belong to the opening.
type file struct{ *os.File }

// open opens the file, which is made where there is none, in the place of anything else.
func (l Locks) open() (file, error) {
	f, err := l.openFile()
	if isForeign(err) {
		f, err = l.replace()
	}
	if err != nil {
		return file{}, fmt.Errorf("opening the locks of attachments: %w", err)
	}
	return file{f}, nil
}

// openFile opens the file where it is one, or none yet.
func (l Locks) openFile() (*os.File, error) {
	return os.OpenFile(l.path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
}

// isForeign says whether the file could not be opened because it is a directory, a link or a socket.
func isForeign(err error) bool {
	return errors.Is(err, unix.EISDIR) || errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO)
}

// replace sets aside what is in the place of the file and is none, and opens a new one. Who else does so meanwhile has to wait, and to look
// again: the file that another has just made must stay.
func (l Locks) replace() (*os.File, error) {
	if err := os.Mkdir(l.aside(), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	dir, err := l.openAside()
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	if err = unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, err
	}
	f, err := l.openFile()
	if !isForeign(err) {
		return f, err
	}
	if err = os.Rename(l.path, fmt.Sprintf("%s/%d", l.aside(), rand.Uint64())); err != nil { //nolint:gosec // no secret
		return nil, err
	}
	return l.openFile()
}

// Aside returns the paths of what was found in the place of the file, and is kept for the operator.
func (l Locks) Aside() (paths []string, err error) {
	dir, err := l.openAside()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = dir.Close() }()
	names, err := dir.Readdirnames(-1)
	for _, name := range names {
		paths = append(paths, filepath.Join(l.aside(), name))
	}
	return paths, err
}

// aside is the directory of what is set aside, and openAside opens it.
func (l Locks) aside() string { return l.path + ".aside" }

func (l Locks) openAside() (*os.File, error) {
	return os.OpenFile(l.aside(), unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
}

// wait locks a byte when it is free. After the context the file must be closed: the wait goes on until then.
func (f file) wait(ctx context.Context, kind int16, offset int64) error {
	err := f.set(unix.F_OFD_SETLK, kind, offset)
	if !errors.Is(err, unix.EAGAIN) && !errors.Is(err, unix.EACCES) {
		return err
	}
	locked := make(chan error, 1)
	go func() { locked <- f.set(unix.F_OFD_SETLKW, kind, offset) }()
	select {
	case err = <-locked:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// try locks an attachment's byte. ok is false where another has.
func (f file) try(link string) (ok bool, err error) {
	err = f.set(unix.F_OFD_SETLK, unix.F_WRLCK, byteOf(link))
	switch {
	case err == nil:
		return true, nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return false, nil
	default:
		return false, fmt.Errorf("locking the attachment of %s: %w", link, err)
	}
}

// set changes the lock of a byte.
func (f file) set(command int, kind int16, offset int64) error {
	for {
		err := unix.FcntlFlock(f.Fd(), command, &unix.Flock_t{Type: kind, Whence: io.SeekStart, Start: offset, Len: 1})
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// byteOf is the byte of an attachment.
func byteOf(link string) int64 {
	sum := sha256.Sum256([]byte(link))
	return int64(binary.BigEndian.Uint64(sum[:]) % door)
}
