package kube

import (
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	backoff "k8s.io/apimachinery/pkg/util/wait"
)

// How long it takes at most until a server that is back is heard again: the kernel gives up a connection on which nothing was
// answered for deadAfter, asked or not, and the next attempt comes at most twice retryAtMost later. client-go's own figures, made
// for fewer and less important clients, are a minute each.
const (
	dialPatience = 3 * time.Second
	probeAfter   = 5 * time.Second
	probeEvery   = 2 * time.Second
	probes       = 2
	deadAfter    = probeAfter + probes*probeEvery
	retryFirst   = 800 * time.Millisecond
	retryAtMost  = 3 * time.Second
)

// newDialer returns what connects to the API server.
func newDialer() *net.Dialer {
	return &net.Dialer{
		Timeout:         dialPatience,
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: probeAfter, Interval: probeEvery, Count: probes},
		Control: func(_, _ string, c syscall.RawConn) error {
			var inner error
			err := c.Control(func(fd uintptr) {
				inner = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(deadAfter.Milliseconds()))
			})
			if err == nil {
				err = inner
			}
			return err
		},
	}
}

// retries is when a list or a watch that failed is tried again. The random part spreads the nodes of a cluster.
func retries() *backoff.Backoff {
	const growth, spread, steps = 2, 1, 3
	return &backoff.Backoff{Duration: retryFirst, Factor: growth, Jitter: spread, Steps: steps, Cap: retryAtMost}
}
