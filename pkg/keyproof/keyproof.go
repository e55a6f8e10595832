// Package keyproof proves that who publishes a WireGuard public key on a Node holds its private key. It is pure but for the
// random bytes of a signature, and knows nothing of Kubernetes or of the tunnel.
//
// A node publishes its public key in an annotation of its own Node, and a stolen node can write there whatever it likes: the key of
// another node too, to take its place. So beside each key stands a proof, a signature over the Node's name and uid that only
// the private key gives. A public key counts for no Node but one for which it is proven.
//
// WireGuard's keys are of X25519, which makes no signatures. The signature is XEdDSA (Trevor Perrin, "The XEdDSA and VXEdDSA
// Signature Schemes", revision 1, Signal 2016): Ed25519 over the same curve, with the key pair that follows from the X25519 one. A
// proof is therefore checked with crypto/ed25519.
//
// Why this is sound:
//   - A copied proof does not verify. It names the Node and its uid, which the API server makes up at random for each object: neither
//     another Node nor one that is made again under the same name has it.
//   - Nobody makes a proof without the private key. Who holds the private key of another node decrypts its traffic already, and
//     could be that node: a proof takes nothing from it, and gives it nothing.
//   - Proofs do not weaken the key. A nonce is a hash of the private key, the message and 64 random bytes under a prefix that no
//     other hash of the scheme has, so that neither a bad source of random numbers nor a fault gives the private key away. The
//     messages begin with a string of their own and are of no other protocol; WireGuard itself signs nothing, and uses the private
//     key for Diffie-Hellman alone.
//   - A message says one thing: its parts stand behind their lengths.
//   - A key has one spelling, and its point an order that is not small: of a point of small order anybody "holds the private key".
package keyproof

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha512"
	"encoding/binary"
	"fmt"

	"filippo.io/edwards25519"
	"filippo.io/edwards25519/field"
)

// domain begins every message that is signed here.
const domain = "warren.cni WireGuard key of a Node, version 1"

// Sign returns the proof that the holder of a WireGuard private key made it for the Node of that name and uid. Two proofs of one
// key are different, and both hold.
func Sign(private [32]byte, node, uid string) ([64]byte, error) {
	var random [64]byte
	if _, err := rand.Read(random[:]); err != nil {
		return [64]byte{}, fmt.Errorf("reading random bytes for the proof of the key: %w", err)
	}
	return sign(private, message(node, uid), random)
}

// Verify says whether a proof was made for the Node of that name and uid by the holder of the private key that belongs to a public one.
func Verify(public [32]byte, node, uid string, proof [64]byte) bool {
	key, ok := edwards(public)
	return ok && ed25519.Verify(key, message(node, uid), proof[:])
}

// message is what is signed: nobody can shift a byte from one part to the next.
func message(node, uid string) []byte {
	m := []byte(domain)
	for _, part := range []string{node, uid} {
		m = binary.BigEndian.AppendUint64(m, uint64(len(part)))
		m = append(m, part...)
	}
	return m
}

// sign is xeddsa_sign of the specification, section 3.
func sign(private [32]byte, message []byte, random [64]byte) ([64]byte, error) {
	a, err := edwards25519.NewScalar().SetBytesWithClamping(private[:])
	if err != nil {
		return [64]byte{}, fmt.Errorf("reading the private key: %w", err)
	}
	public := new(edwards25519.Point).ScalarBaseMult(a).Bytes()
	if public[31]&0x80 != 0 { // who verifies takes the point of the two whose sign is 0
		a.Negate(a)
		public[31] &^= 0x80
	}
	// 2^256 - 2, the first of the hashes that take a number which is no point: h below begins with one.
	prefix := [32]byte{0: 0xfe}
	for i := range prefix[1:] {
		prefix[1+i] = 0xff
	}
	r, err := hash(prefix[:], a.Bytes(), message, random[:])
	if err != nil {
		return [64]byte{}, err
	}
	commitment := new(edwards25519.Point).ScalarBaseMult(r).Bytes()
	h, err := hash(commitment, public, message)
	if err != nil {
		return [64]byte{}, err
	}
	s := edwards25519.NewScalar().MultiplyAdd(h, a, r)
	return [64]byte(append(commitment, s.Bytes()...)), nil
}

// hash is SHA-512 as a number modulo the order of the group.
func hash(parts ...[]byte) (*edwards25519.Scalar, error) {
	sum := sha512.New()
	for _, p := range parts {
		sum.Write(p)
	}
	scalar, err := edwards25519.NewScalar().SetUniformBytes(sum.Sum(nil))
	if err != nil {
		return nil, fmt.Errorf("reducing a hash: %w", err)
	}
	return scalar, nil
}

// edwards is convert_mont of the specification, section 2.3: the Ed25519 key with sign 0 of a point on the Montgomery curve,
// y = (u - 1)/(u + 1). It refuses what is no public key: a number that is not reduced, and a point of small order or of
// the curve's twist.
func edwards(public [32]byte) (ed25519.PublicKey, bool) {
	u, err := new(field.Element).SetBytes(public[:])
	if err != nil || [32]byte(u.Bytes()) != public {
		return nil, false
	}
	one := new(field.Element).One()
	// The inverse of 0 is 0 here, so u = -1 becomes y = 0: a point of order 4, refused below.
	inverse := new(field.Element).Add(u, one)
	inverse.Invert(inverse)
	y := new(field.Element).Subtract(u, one)
	y.Multiply(y, inverse)
	point, err := new(edwards25519.Point).SetBytes(y.Bytes())
	if err != nil || new(edwards25519.Point).MultByCofactor(point).Equal(edwards25519.NewIdentityPoint()) == 1 {
		return nil, false
	}
	return y.Bytes(), true
}
