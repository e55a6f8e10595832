package ipam

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"net/netip"

	"golang.org/x/sys/unix"
)

// memory is what is in the lock's file. All of it only saves time: without it, or where it lies, the names are looked at.
type memory []byte

// Where the memory has what.
const (
	// lastAt is where the address is that was leased last, in 16 bytes for each family.
	lastAt = 0
	// marksAt is where each address that is leased has a bit, by its last 16 bits, for each family. (Earlier versions keep more before it.)
	marksAt = 4096
	// marksSize is how many bytes these are for a family.
	marksSize = 1 << markedBits / 8
	// markedBits is how many bits of an address tell its mark.
	markedBits = 16
	// memorySize is how much all that is.
	memorySize = marksAt + 2*marksSize
)

// recall returns the memory, and what saves it. What is not in the file is zero; what cannot be read is not written over.
func (l lock) recall() (m memory, save func()) {
	m = make(memory, memorySize)
	if again(func() error { _, err := unix.Pread(int(l), m, 0); return err }) != nil {
		return m, func() {}
	}
	return m, func() { _ = again(func() error { _, err := unix.Pwrite(int(l), m, 0); return err }) }
}

// peek returns the memory without the lock.
func (s *Store) peek() (memory, error) {
	fd, err := open(s.path(lockFile), unix.O_RDONLY|unix.O_NONBLOCK) // also where it is a pipe
	if errors.Is(err, fs.ErrNotExist) || isForeign(err) {
		return make(memory, memorySize), nil
	}
	if err != nil {
		return nil, fmt.Errorf("looking at leases: %w", err)
	}
	l := lock(fd)
	defer l.unlock()
	m, _ := l.recall()
	return m, nil
}

// last returns the address of a family that was leased last, if it is remembered.
func (m memory) last(family netip.Addr) netip.Addr {
	return netip.AddrFrom16([16]byte(m[lastAt+16*number(family):])).Unmap()
}

// remembers says whether an address of a family was leased since the memory began.
func (m memory) remembers(family netip.Addr) bool { return m.last(family) != netip.IPv6Unspecified() }

// leased remembers that an address is leased.
func (m memory) leased(a netip.Addr) {
	b := a.As16()
	copy(m[lastAt+16*number(a):], b[:])
	at, bit := place(a)
	m[at] |= bit
}

// released remembers that an address is leased no longer.
func (m memory) released(a netip.Addr) {
	at, bit := place(a)
	m[at] &^= bit
}

// mark marks the addresses of a range, and no other of its family.
func (m memory) mark(r netip.Prefix, addresses []netip.Addr) {
	clear(m[marksOf(r.Addr()):][:marksSize])
	for _, a := range addresses {
		if r.Contains(a) {
			at, bit := place(a)
			m[at] |= bit
		}
	}
}

// pick returns the first address of a range behind the one leased last that is neither marked nor taken, round about: an address
// that was just released is the last to be leased again. It returns the zero address where there is none. It looks at no more addresses
// than are taken, however large the range, and at none behind one of which that cannot be told.
func (m memory) pick(r netip.Prefix, taken func(netip.Addr) (bool, error)) (netip.Addr, error) {
	first, last, ok := span(r)
	if !ok {
		return netip.Addr{}, fmt.Errorf("range %s has no address to lease beside the node's own", r)
	}
	start := first
	if a := m.last(first); first.Compare(a) <= 0 && a.Compare(last) < 0 {
		start = a.Next()
	}
	for _, part := range [][2]netip.Addr{{start, last}, {first, start.Prev()}} {
		for a := m.unmarked(r, part[0], part[1]); a.IsValid(); a = m.unmarked(r, a.Next(), part[1]) {
			if is, err := taken(a); err != nil {
				return netip.Addr{}, err
			} else if !is {
				return a, nil
			}
		}
	}
	return netip.Addr{}, nil
}

// unmarked returns the first address of a part of a range that is not marked, if there is any. In a range in which several addresses share
// a mark none is.
func (m memory) unmarked(r netip.Prefix, from, to netip.Addr) netip.Addr {
	if !from.IsValid() || from.Compare(to) > 0 { // there is none behind the last address of all
		return netip.Addr{}
	}
	if from.BitLen()-r.Bits() > markedBits {
		return from
	}
	b := from.As16()
	marks := m[marksOf(from):]
	for tail, end := tailOf(from), tailOf(to); tail <= end; tail += 64 - tail%64 {
		free := ^binary.LittleEndian.Uint64(marks[tail/64*8:]) >> (tail % 64)
		if free == 0 {
			continue
		}
		if tail += uint(bits.TrailingZeros64(free)); tail > end {
			break
		}
		binary.BigEndian.PutUint16(b[14:], uint16(tail)) //nolint:gosec // no more than end
		return netip.AddrFrom16(b).Unmap()
	}
	return netip.Addr{}
}

// number is that of an address's family.
func number(a netip.Addr) int {
	if a.Is4() {
		return 0
	}
	return 1
}

// marksOf is where the marks of an address's family are, and place the byte and the bit of its own.
func marksOf(a netip.Addr) int { return marksAt + marksSize*number(a) }

func place(a netip.Addr) (at int, bit byte) {
	tail := tailOf(a)
	return marksOf(a) + int(tail/8), 1 << (tail % 8)
}

// tailOf is what tells the mark of an address.
func tailOf(a netip.Addr) uint {
	b := a.As16()
	return uint(binary.BigEndian.Uint16(b[14:]))
}
