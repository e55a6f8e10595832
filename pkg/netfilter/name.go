package netfilter

import (
	"crypto/sha256"
	"encoding/base32"
	"strconv"
	"strings"
)

// base32Alphabet are the characters of a hash.
const base32Alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ234567"

// PolicyChain is the chain in mangle that new connections of pods go to last (pkg/guard jumps to it, pkg/policy makes it).
// It sets JudgedMark where they are allowed.
const PolicyChain = Prefix + "-POLICY"

// nameHash is how many characters of a name are hash: 80 bits, so that nobody finds two policies of one name by trying.
const nameHash = 16

// Name returns the name of a chain or set: the prefix, the kind, and a hash of the parts, in which their borders count
// (("a", "bc") is not ("ab", "c")). With a kind of at most 4 characters it fits a chain's 28 characters and a set's 31.
func Name(kind string, parts ...string) string {
	return Prefix + "-" + kind + "-" + digest(nameHash, parts...)
}

// SetName returns the name of a set, which carries its family: the kernel has one name space for both.
func SetName(f Family, kind string, parts ...string) string {
	return Name(kind+strconv.Itoa(int(f)), parts...)
}

// ReadySet is the set of the start gate: the addresses of local pods whose policies stand in the kernel. The plugin takes
// addresses out, only the daemon puts them in.
func ReadySet(f Family) string {
	return Prefix + "-READY" + strconv.Itoa(int(f))
}

// digest returns n characters that identify the parts.
func digest(n int, parts ...string) string {
	var b strings.Builder
	for _, p := range parts {
		b.WriteString(strconv.Itoa(len(p)))
		b.WriteByte(':')
		b.WriteString(p)
	}
	sum := sha256.Sum256([]byte(b.String()))
	return base32.StdEncoding.EncodeToString(sum[:])[:n]
}
