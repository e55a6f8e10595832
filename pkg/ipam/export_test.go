package ipam

import (
	"net/netip"
	"time"
)

// SetClock sets what tells the time since the boot.
func (s *Store) SetClock(now func() (time.Duration, error)) { s.now = now }

// SetBoot sets what tells the boots apart.
func (s *Store) SetBoot(id func() (string, error)) { s.bootID = id }

// Plain reads the text of a lease's file in the fast way, where it can.
func Plain(text string) (Lease, bool) { return plain(text) }

// Resave reads what the lock's file holds and writes it back, by a descriptor of it.
func Resave(fd int) {
	_, save := lock(fd).recall()
	save()
}

// Choose returns what chooses an address in memory, where that many of the range are leased, and all of them are passed by.
func Choose(r netip.Prefix, leased int) (choose func() (netip.Addr, error)) {
	m := make(memory, memorySize)
	first, _, _ := span(r)
	a := first
	for range leased {
		m.leased(a)
		a = a.Next()
	}
	m.leased(first)
	return func() (netip.Addr, error) { return m.pick(r, func(netip.Addr) (bool, error) { return false, nil }) }
}
