// Package inflight keeps apart those who work on the same attachment at the same time: ADD, DEL, the garbage collection of the
// runtime, and the daemon's own.
//
// Everybody who changes an attachment holds its lock meanwhile. Locks of different attachments have nothing to do with each other, so
// that pods come and go at once. A garbage collection must take away nothing of an ADD that runs beside it, and such an ADD may end
// before the collection comes to its attachment; so it finds out what there is while nobody begins, and takes the locks of what it collects at
// that moment, but for those of others who are at work. Nobody ever waits for more than that moment, or for the collection of the one
// attachment that is meant.
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
	"math/rand/v2"
	"os"
	"path/filepath"

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
	err = f.set(unix.F_OFD_SETLK, unix.F_WRLCK, byteOf(link))
	switch {
	case err == nil:
		return func() { _ = f.Close() }, true, nil
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EACCES):
		return nil, false, f.Close()
	default:
		return nil, false, errors.Join(fmt.Errorf("locking the attachment of %s: %w", link, err), f.Close())
	}
}

// Pause calls do while nobody begins; who works already goes on.
func (l Locks) Pause(ctx context.Context, do func() error) error {
	f, err := l.open()
	if err != nil {
		return err
	}
	if err = f.wait(ctx, unix.F_WRLCK, door); err != nil {
		return errors.Join(fmt.Errorf("waiting for those who begin with an attachment: %w", err), f.Close())
	}
	return errors.Join(do(), f.Close())
}

// file is the file of the locks, opened once for each who locks: the locks belong to the opening.
type file struct{ *os.File }

// open opens the file. A directory in its place is set aside: by a rename of what is a directory, because another may have done it just
// now, whose new file must stay.
func (l Locks) open() (file, error) {
	f, err := os.OpenFile(l.path, os.O_RDWR|os.O_CREATE, 0o600)
	if errors.Is(err, unix.EISDIR) {
		err = unix.Rename(l.path+"/", fmt.Sprintf("%s.aside-%d", l.path, rand.Uint64())) //nolint:gosec // no secret
		if err == nil || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ENOENT) {
			f, err = os.OpenFile(l.path, os.O_RDWR|os.O_CREATE, 0o600)
		}
	}
	if err != nil {
		return file{}, fmt.Errorf("opening the locks of attachments: %w", err)
	}
	return file{f}, nil
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
