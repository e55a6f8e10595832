package wgdevice

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/ipc"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/warren-cni/warren/pkg/mesh"
)

// busyCheck is how often a tunnel that waits for another one asks whether the device is free.
const busyCheck = 10 * time.Millisecond

// RunTunnel runs WireGuard in this process, behind the TUN device warren0, until the context ends or the device is deleted,
// which is an error. Where another tunnel has the device, or one that is just dying, it waits for it.
//
// The device is persistent: it stays when the process ends, with its addresses and routes, so that traffic is dropped and
// does not fall to the default route. The next RunTunnel takes it over, and the daemon's next Apply configures it again.
// It must run in the network namespace of the process, because its sockets are opened by many threads.
func RunTunnel(ctx context.Context, log *slog.Logger) error {
	if err := HideMemory(); err != nil {
		return err
	}
	leaveProcessors()
	defer runtime.KeepAlive(ballast())
	tunnel, err := openTUN(ctx, log)
	if ctx.Err() != nil && tunnel == nil {
		return nil
	}
	if err != nil {
		return fmt.Errorf("opening the TUN device %s: %w", mesh.Link, err)
	}
	wg := device.NewDevice(tunnel, conn.NewDefaultBind(), wireguardLog(ctx, log))
	defer wg.Close()
	return serveTunnel(ctx, wg, log)
}

// leaveProcessors takes half of the processors for the process, but two where there are two, unless the environment says how many. The
// others are for the kernel's part of the work and for pods.
func leaveProcessors() {
	if os.Getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(processors(runtime.GOMAXPROCS(0)))
	}
}

// processors is how many of all the process takes.
func processors(all int) int { return max(min(all, 2), all/2) }

// ballast is memory that is counted and never touched, so no page of it is ever there. Without it garbage is collected each time that
// twice what is in use has come together, which is little here. A collection takes away the buffers of the pools, too, and to map and
// clear others in their place, thousands of times a second, costs the tunnel more than the collection.
func ballast() []byte { return make([]byte, 32<<20) }

// HideMemory keeps the memory of this process, which holds the private key, out of core dumps and from other programs of its
// user.
func HideMemory() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("forbidding core dumps: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("hiding the memory of the process: %w", err)
	}
	return nil
}

// openTUN makes warren0, or attaches to it where it is there already, and lets it outlive the process. While another process is
// attached it waits.
func openTUN(ctx context.Context, log *slog.Logger) (tun.Device, error) {
	again := time.NewTicker(busyCheck)
	defer again.Stop()
	for told := false; ; told = true {
		tunnel, err := attachTUN()
		if !errors.Is(err, unix.EBUSY) {
			return tunnel, err
		}
		if !told {
			log.Info("another tunnel runs: waiting until it ends", "link", mesh.Link)
		}
		select {
		case <-again.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// attachTUN is openTUN without the waiting.
func attachTUN() (tun.Device, error) {
	mtu, err := linkMTU()
	if err != nil {
		return nil, err
	}
	tunnel, err := tun.CreateTUN(mesh.Link, mtu)
	if errors.Is(err, unix.EPERM) {
		return nil, fmt.Errorf("%w: it needs CAP_NET_ADMIN and access to /dev/net/tun", err)
	}
	if err != nil {
		return nil, err
	}
	raw, err := tunnel.File().SyscallConn()
	if err == nil {
		errControl := raw.Control(func(fd uintptr) { err = unix.IoctlSetInt(int(fd), unix.TUNSETPERSIST, 1) })
		err = errors.Join(err, errControl)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("making it persistent: %w", err), tunnel.Close())
	}
	return tunnel, nil
}

// linkMTU returns the MTU of the link as it stands: opening the device sets one, and what the daemon chose is to stay.
func linkMTU() (int, error) {
	k, err := openKernel()
	if err != nil {
		return 0, err
	}
	defer k.Close()
	link, err := k.link()
	if err != nil || link == nil {
		return device.DefaultMTU, err
	}
	return link.Attrs().MTU, nil
}

// serveTunnel answers on the socket through which wgctrl configures the device.
func serveTunnel(ctx context.Context, wg *device.Device, log *slog.Logger) error {
	file, err := ipc.UAPIOpen(mesh.Link)
	if err != nil {
		return fmt.Errorf("opening the tunnel's socket: %w", err)
	}
	socket, err := ipc.UAPIListen(mesh.Link, file)
	err = errors.Join(err, file.Close()) // the listener has a copy
	if err != nil {
		return fmt.Errorf("listening on the tunnel's socket: %w", err)
	}
	failed := make(chan error, 1)
	go func() { failed <- answer(socket, wg, log) }()
	log.Info("tunnel ready", "link", mesh.Link, "socket", uapiSocket)

	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
		err = fmt.Errorf("serving the tunnel's socket: %w", err)
	case <-wg.Wait():
		err = fmt.Errorf("link %s was deleted", mesh.Link)
	}
	_ = socket.Close() // its watch of the socket's file may be closed already
	if errRemove := os.Remove(uapiSocket); !errors.Is(errRemove, fs.ErrNotExist) {
		err = errors.Join(err, errRemove)
	}
	return err
}

func answer(socket net.Listener, wg *device.Device, log *slog.Logger) error {
	for {
		c, err := socket.Accept()
		if err != nil {
			return err
		}
		go func() {
			wg.IpcHandle(c)
			if err := allowFragments(); err != nil { // the port may be another one
				log.Warn("packets of the tunnel stay whole", "error", err)
			}
		}()
	}
}

// wireguardLog passes what WireGuard says of itself on.
func wireguardLog(ctx context.Context, log *slog.Logger) *device.Logger {
	logger := &device.Logger{
		Verbosef: device.DiscardLogf,
		Errorf: func(format string, args ...any) {
			log.Warn("wireguard", "message", fmt.Sprintf(format, args...))
		},
	}
	if log.Enabled(ctx, slog.LevelDebug) {
		logger.Verbosef = func(format string, args ...any) {
			log.Debug("wireguard", "message", fmt.Sprintf(format, args...))
		}
	}
	return logger
}
