package wgdevice

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.zx2c4.com/wireguard/tun"
)

// source is a TUN device that always has one packet, and takes all.
type source struct {
	tun.Device
	size int
}

func (s source) Read(_ [][]byte, sizes []int, _ int) (int, error) {
	sizes[0] = s.size
	return 1, nil
}

func (s source) Write(bufs [][]byte, _ int) (int, error) { return len(bufs), nil }

// machine has that many processors, and notes how many a process is to use.
type machine struct {
	mu   sync.Mutex
	all  int
	used []int
}

func (m *machine) set(n int) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if n > 0 {
		m.used = append(m.used, n)
	}
	return m.all
}

func (m *machine) now() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used[len(m.used)-1]
}

// A tunnel has all processors while much passes, either way, and half of them before and after.
func TestProcessors(t *testing.T) {
	const size = 60000
	const offset = 16
	for name, c := range map[string]struct {
		all   int
		pass  func(*processors)
		every time.Duration
		busy  int
	}{
		"much leaves":       {8, func(p *processors) { _, _ = p.Read(nil, make([]int, 1), offset) }, time.Millisecond, 8},
		"much comes":        {8, func(p *processors) { _, _ = p.Write([][]byte{make([]byte, size+offset)}, offset) }, time.Millisecond, 8},
		"little passes":     {8, func(p *processors) { _, _ = p.Read(nil, make([]int, 1), offset) }, 10 * time.Millisecond, 4},
		"of two processors": {2, func(p *processors) { _, _ = p.Read(nil, make([]int, 1), offset) }, time.Millisecond, 2},
		"of one processor":  {1, func(p *processors) { _, _ = p.Read(nil, make([]int, 1), offset) }, time.Millisecond, 1},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				m := &machine{all: c.all}
				p := newProcessors(source{size: size}, m.set)
				go p.run(t.Context())
				half := max(1, c.all/2)
				synctest.Wait()
				if got := m.now(); got != half {
					t.Errorf("before anything passes it has %d processors, want %d", got, half)
				}
				for turn := range 3 {
					for range 500 {
						c.pass(p)
						time.Sleep(c.every) //nolint:forbidigo // of the test's own clock
					}
					if got := m.now(); got != c.busy {
						t.Errorf("turn %d: while it passes it has %d processors, want %d", turn, got, c.busy)
					}
					time.Sleep(2 * calmTime) //nolint:forbidigo // the same
					if got := m.now(); got != half {
						t.Errorf("turn %d: when it is over it has %d processors, want %d", turn, got, half)
					}
				}
				if most := 1 + 3*2; len(m.used) > most {
					t.Errorf("the number was set %d times, want at most %d: %v", len(m.used), most, m.used)
				}
			})
		})
	}
}
