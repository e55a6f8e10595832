package wgdevice

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"

	"golang.org/x/sys/unix"
	"golang.zx2c4.com/wireguard/conn"
	"golang.zx2c4.com/wireguard/device"
	"golang.zx2c4.com/wireguard/ipc"
	"golang.zx2c4.com/wireguard/tun"

	"github.com/warren-cni/warren/pkg/mesh"
)

// RunTunnel runs WireGuard in this process, behind the TUN device warren0, until the context ends. Where mode is
// ModeKernel, or ModeAuto and the kernel has WireGuard, there is nothing to run and it only waits.
//
// The device is persistent: it stays when the process ends, with its addresses and routes, so that traffic is dropped and
// does not fall to the default route. The next RunTunnel takes it over, and the daemon's next Apply configures it again.
// It must run in the network namespace of the process, because its sockets are opened by many threads.
func RunTunnel(ctx context.Context, o Options) error {
	k, err := openKernel()
	if err != nil {
		return err
	}
	defer k.Close()
	mode, err := New(o).resolve(k)
	if err != nil {
		return err
	}
	if mode == ModeKernel {
		o.Log.Info("the kernel runs WireGuard: nothing to do here")
		<-ctx.Done()
		return nil
	}

	mtu := device.DefaultMTU
	link, err := k.link()
	if err != nil {
		return err
	}
	if link != nil {
		mtu = link.Attrs().MTU // opening the device sets its MTU, and what the daemon chose is to stay
	}
	tunnel, err := openTUN(mtu)
	if err != nil {
		return fmt.Errorf("opening the TUN device %s: %w", mesh.Link, err)
	}
	wg := device.NewDevice(tunnel, conn.NewDefaultBind(), wireguardLog(ctx, o.Log))
	defer wg.Close()
	return serveTunnel(ctx, wg, o.Log)
}

// openTUN makes warren0, or attaches to it where it is there already, and lets it outlive the process.
func openTUN(mtu int) (tun.Device, error) {
	tunnel, err := tun.CreateTUN(mesh.Link, mtu)
	switch {
	case errors.Is(err, unix.EBUSY):
		return nil, fmt.Errorf("%w: another tunnel runs on it", err)
	case errors.Is(err, unix.EPERM):
		return nil, fmt.Errorf("%w: it needs CAP_NET_ADMIN and access to /dev/net/tun", err)
	case err != nil:
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
	go func() { failed <- answer(socket, wg) }()
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

func answer(socket net.Listener, wg *device.Device) error {
	for {
		c, err := socket.Accept()
		if err != nil {
			return err
		}
		go wg.IpcHandle(c)
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
