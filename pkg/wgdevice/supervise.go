package wgdevice

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"runtime/debug"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/mesh"
)

// restartEvery is the least time between two starts of the tunnel's process: one that cannot start must not use up a processor.
const restartEvery = 200 * time.Millisecond

// timerSlack is how late, in nanoseconds, the sleeps of the tunnel's threads may end, which inherit it. Under load Go's runtime wakes up every
// 20 us, by default 50 us late, to look whether a system call takes long, and then hands its processor to another thread. The tunnel's
// system calls take that long all the time, and the wake-ups, the hand-overs and cold caches cost more than that gains.
// Nothing of WireGuard's comes by the millisecond.
const timerSlack = 1e6

// endPatience is how long the tunnel's process may take to end when it is asked to.
const endPatience = 3 * time.Second

// SuperviseTunnel keeps a user-space tunnel running until the context ends. The tunnel is command, a program with its arguments,
// which is to call RunTunnel; whatever ends that process, it is started again at once, and it never outlives this one.
//
// Where the kernel runs WireGuard there is nothing to run, and it only waits: in ModeAuto where the kernel has WireGuard, in
// ModeUserspace as long as the link is the kernel's, because the daemon decides which of the two it is.
func SuperviseTunnel(ctx context.Context, o Options, command []string) error {
	for ctx.Err() == nil {
		needed, err := awaitNeed(ctx, o)
		if err != nil || !needed {
			return err
		}
		again := time.NewTimer(restartEvery)
		err = runProcess(ctx, command)
		if ctx.Err() != nil {
			return err
		}
		o.Log.Warn("the tunnel ended: starting it again", "error", err)
		select {
		case <-again.C:
		case <-ctx.Done():
		}
	}
	return nil
}

// awaitNeed waits until a tunnel is needed, and says false when the context ends before that.
func awaitNeed(ctx context.Context, o Options) (bool, error) {
	k, err := openKernel()
	if err != nil {
		return false, err
	}
	defer k.Close()
	mode, err := New(o).resolve(k)
	if err != nil {
		return false, err
	}
	if mode == ModeKernel {
		idle(o.Log)
		<-ctx.Done()
		return false, nil
	}
	return awaitLink(ctx, k, o.Log)
}

// awaitLink waits until the link, if there is one, is not the kernel's WireGuard.
func awaitLink(ctx context.Context, k *kernel, log *slog.Logger) (bool, error) {
	updates, done := make(chan netlink.LinkUpdate), make(chan struct{})
	defer close(done)
	if err := netlink.LinkSubscribe(updates, done); err != nil {
		return false, fmt.Errorf("following links: %w", err)
	}
	for told := false; ; told = true {
		link, err := k.link()
		if err != nil || link == nil || link.Type() != typeWireGuard {
			return err == nil, err
		}
		if !told {
			idle(log)
		}
		select {
		case <-ctx.Done():
			return false, nil
		case _, open := <-updates:
			if !open {
				return false, errors.New("following links: the kernel's news ended")
			}
		}
	}
}

// idle says that there is nothing to do, and gives back the memory that it took to find out.
func idle(log *slog.Logger) {
	log.Info("the kernel runs WireGuard: nothing to do here", "link", mesh.Link)
	debug.FreeOSMemory()
}

// runProcess runs the tunnel's process until it ends, or ends it when the context does.
func runProcess(ctx context.Context, command []string) error {
	// The kernel ends the process together with the thread that started it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, timerSlack, 0, 0, 0); err != nil {
		return fmt.Errorf("letting the tunnel's timers be late: %w", err)
	}
	process, err := os.StartProcess(command[0], command, &os.ProcAttr{
		Env:   os.Environ(),
		Files: []*os.File{nil, os.Stdout, os.Stderr},
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	})
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 0, 0, 0, 0) // the default again, which cannot fail
	if err != nil {
		return fmt.Errorf("starting the tunnel's process: %w", err)
	}
	ended := make(chan error, 1)
	go func() { ended <- wait(process) }()
	select {
	case err = <-ended:
		return err
	case <-ctx.Done():
	}
	errSignal := process.Signal(syscall.SIGTERM)
	select {
	case err = <-ended:
		return err
	case <-time.After(endPatience):
		return errors.Join(fmt.Errorf("the tunnel's process did not end within %v", endPatience), errSignal, process.Kill(), <-ended)
	}
}

// wait waits for the end of a process, and returns an error unless it was a good one.
func wait(process *os.Process) error {
	state, err := process.Wait()
	if err != nil {
		return fmt.Errorf("waiting for the tunnel's process: %w", err)
	}
	if !state.Success() {
		return fmt.Errorf("the tunnel's process: %v", state)
	}
	return nil
}
