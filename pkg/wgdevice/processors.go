package wgdevice

import (
	"context"
	"os"
	"runtime"
	"sync/atomic"
	"time"

	"golang.zx2c4.com/wireguard/tun"
)

// When a tunnel is busy: two chunks that end within chunkTime make it so, and until less than calm bytes pass in calmTime it stays so.
const (
	chunk     = 1 << 20
	chunkTime = 25 * time.Millisecond
	calm      = 160 << 10
	calmTime  = 25 * time.Millisecond
)

// processors is a TUN device that gives its process all processors while much passes, and half of them while little does.
//
// With few, goroutines wake each other less often, which a round trip gains by. What passes much spends its time in the kernel, which
// carries a packet all the way to a pod inside the system call that hands it over, and with few processors nothing else runs meanwhile.
type processors struct {
	tun.Device

	passed atomic.Int64
	// more tells that another chunk has passed.
	more chan struct{}
	// set is runtime.GOMAXPROCS.
	set func(int) int
}

// withProcessors returns the device that does so until the context ends. Where the environment says how many processors the process has, it
// is the device alone.
func withProcessors(ctx context.Context, device tun.Device) tun.Device {
	if os.Getenv("GOMAXPROCS") != "" {
		return device
	}
	p := newProcessors(device, runtime.GOMAXPROCS)
	go p.run(ctx)
	return p
}

func newProcessors(device tun.Device, set func(int) int) *processors {
	return &processors{Device: device, more: make(chan struct{}, 1), set: set}
}

// Read reads packets that leave by the tunnel.
func (p *processors) Read(bufs [][]byte, sizes []int, offset int) (n int, err error) {
	n, err = p.Device.Read(bufs, sizes, offset)
	bytes := 0
	for _, size := range sizes[:n] {
		bytes += size
	}
	p.count(bytes)
	return n, err
}

// Write writes packets that came by the tunnel.
func (p *processors) Write(bufs [][]byte, offset int) (int, error) {
	bytes := 0
	for _, b := range bufs {
		bytes += len(b) - offset
	}
	p.count(bytes)
	return p.Device.Write(bufs, offset)
}

// count counts what passes.
func (p *processors) count(bytes int) {
	after := p.passed.Add(int64(bytes))
	if after/chunk == (after-int64(bytes))/chunk {
		return
	}
	select {
	case p.more <- struct{}{}:
	default:
	}
}

// run sets how many processors there are. While nothing passes it does not wake up, and while little does, once for each chunk.
func (p *processors) run(ctx context.Context) {
	all := p.set(0)
	half := max(1, all/2)
	p.set(half)
	for last := time.Now(); ; { //nolint:forbidigo // it measures how fast something is
		select {
		case <-ctx.Done():
			return
		case <-p.more:
		}
		now := time.Now() //nolint:forbidigo // the same
		if now.Sub(last) < chunkTime {
			p.set(all)
			p.calm(ctx)
			p.set(half)
		}
		last = now
	}
}

// calm returns when little passes.
func (p *processors) calm(ctx context.Context) {
	ticker := time.NewTicker(calmTime)
	defer ticker.Stop()
	for before := p.passed.Load(); ; {
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
		now := p.passed.Load()
		if now-before < calm {
			return
		}
		before = now
	}
}
