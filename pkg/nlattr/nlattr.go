// Package nlattr reads the attributes of netlink messages (RFC 3549, section 2.2: type, length and value, padded to four bytes).
package nlattr

import (
	"encoding/binary"
	"iter"

	"golang.org/x/sys/unix"
)

// header is the length of an attribute's type and length, typeMask the type without its flags.
const (
	header   = 4
	typeMask = ^uint16(unix.NLA_F_NESTED | unix.NLA_F_NET_BYTEORDER)
)

// All yields the attributes of a message without the flags of their types, except empty ones. It ends at the first that is cut
// short.
func All(b []byte) iter.Seq2[uint16, []byte] {
	return func(yield func(uint16, []byte) bool) {
		for len(b) >= header {
			n := int(binary.NativeEndian.Uint16(b))
			if n < header || n > len(b) {
				return
			}
			if n > header && !yield(binary.NativeEndian.Uint16(b[2:])&typeMask, b[header:n]) {
				return
			}
			b = b[min((n+3)&^3, len(b)):]
		}
	}
}
