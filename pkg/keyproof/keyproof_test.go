package keyproof

import (
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"testing"
)

const (
	testNode = "node-1"
	testUID  = "6f5b2c7e-0d8a-4a52-9b0e-3f1f6f1c2d3e"
)

// TestVectors compares with proofs computed from the specification with plain integers (a Montgomery ladder for the public key,
// affine Edwards arithmetic for the rest), for keys of both signs.
func TestVectors(t *testing.T) {
	var random [64]byte
	for i := range random {
		random[i] = byte(i)
	}
	for name, test := range map[string]struct{ private, public, proof string }{
		"sign 0": {
			"25303b46515c67727d88939ea9b4bfcad5e0ebf6010c17222d38434e59646f7a",
			"9c7c9d24ecfa178ee6fb76b73552f5cd538d3be7dcbeeb3bf6f997fb2935c93a",
			"d312abd20fb0dd5f6dc4175bbab21c0e741d22b93a639f3ee1fb1bff82555f9946864d78335e9e0de868dd9b0db103cf550a5f940e2b789068c73a5759c96806",
		},
		"sign 1": {
			"dee9f4ff0a15202b36414c57626d78838e99a4afbac5d0dbe6f1fc07121d2833",
			"f563fb0f02788eba17740c30a4e023e5b845a6062e43b4174e6d5302287c2f08",
			"e6d188ebe0ba3eadb6e758eeeeb7c3a3ca86456b1ce8f86a25a90cbbd3a94ea940b5d6c8722fa68afc97833809db34359467327e0dcc1c819d144cc4493fca03",
		},
	} {
		t.Run(name, func(t *testing.T) {
			proof, err := sign([32]byte(unhex(t, test.private)), message(testNode, testUID), random)
			if err != nil {
				t.Fatal(err)
			}
			if got := hex.EncodeToString(proof[:]); got != test.proof {
				t.Errorf("proof %s, want %s", got, test.proof)
			}
			if !Verify([32]byte(unhex(t, test.public)), testNode, testUID, proof) {
				t.Error("the proof does not verify")
			}
		})
	}
}

// TestOnlyItsOwn shows that a proof holds for one key, name and uid, and for no other.
func TestOnlyItsOwn(t *testing.T) {
	private, public := newKey(t)
	_, other := newKey(t)
	proof, err := Sign(private, testNode, testUID)
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		public    [32]byte
		node, uid string
		want      bool
	}{
		"itself":                              {public, testNode, testUID, true},
		"another key":                         {other, testNode, testUID, false},
		"another name":                        {public, "node-2", testUID, false},
		"another uid":                         {public, testNode, "6f5b2c7e-0d8a-4a52-9b0e-3f1f6f1c2d3f", false},
		"no uid":                              {public, testNode, "", false},
		"neither":                             {public, "", "", false},
		"a byte moved from the uid":           {public, testNode + "6", testUID[1:], false},
		"all of it in the name":               {public, testNode + testUID, "", false},
		"the key with the bit that is unused": {highBit(public), testNode, testUID, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := Verify(test.public, test.node, test.uid, proof); got != test.want {
				t.Errorf("Verify = %v, want %v", got, test.want)
			}
		})
	}
	for bit := range 8 * len(proof) {
		flipped := proof
		flipped[bit/8] ^= 1 << (bit % 8)
		if Verify(public, testNode, testUID, flipped) {
			t.Errorf("the proof verifies with bit %d flipped", bit)
		}
	}
	for bit := range 8 * len(public) {
		flipped := public
		flipped[bit/8] ^= 1 << (bit % 8)
		if Verify(flipped, testNode, testUID, proof) {
			t.Errorf("the proof verifies for the key with bit %d flipped", bit)
		}
	}
}

func TestProofsDiffer(t *testing.T) {
	private, public := newKey(t)
	seen := map[[64]byte]bool{}
	for range 50 { // keys of both signs are in TestVectors
		proof, err := Sign(private, testNode, testUID)
		if err != nil {
			t.Fatal(err)
		}
		if seen[proof] || !Verify(public, testNode, testUID, proof) {
			t.Fatalf("proof %x is there twice, or does not verify", proof)
		}
		seen[proof] = true
	}
}

// TestNoPublicKey gives keys for which anybody could make a proof, or that are none. With A of small order, R = sB holds for
// every h that the order divides: the signature (identity, 0) is such a one for one message in eight at the least.
func TestNoPublicKey(t *testing.T) {
	identity := [64]byte{0: 1}
	for name, text := range map[string]string{
		"zero":                   "0000000000000000000000000000000000000000000000000000000000000000",
		"order 4":                "0100000000000000000000000000000000000000000000000000000000000000",
		"order 8":                "e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800",
		"order 8, the other":     "5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157",
		"-1":                     "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"not reduced: p":         "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"not reduced: p + 9":     "f6ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
		"all ones":               "ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff",
		"of the twist (u = 2)":   "0200000000000000000000000000000000000000000000000000000000000000",
		"the base point + 2^255": "0900000000000000000000000000000000000000000000000000000000000080",
	} {
		t.Run(name, func(t *testing.T) {
			public := [32]byte(unhex(t, text))
			if key, ok := edwards(public); ok {
				t.Errorf("the key is taken, as %x", key)
			}
			for i := range 64 {
				if Verify(public, testNode, string(rune('a'+i)), identity) {
					t.Fatal("a proof that nobody signed verifies")
				}
			}
		})
	}
	base := [32]byte{9}
	if _, ok := edwards(base); !ok {
		t.Error("the base point is refused: this test shows nothing")
	}
}

// FuzzVerify looks for a proof that holds for what it was not made for.
func FuzzVerify(f *testing.F) {
	// A fixed one: the processes that share the fuzzing have to agree about it.
	private := [32]byte{1}
	public := publicOf(f, private)
	proof, err := sign(private, message(testNode, testUID), [64]byte{})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(public[:], testNode, testUID, proof[:])
	f.Add(make([]byte, 32), "", "", make([]byte, 64))
	f.Fuzz(func(t *testing.T, key []byte, node, uid string, signature []byte) {
		var k [32]byte
		var s [64]byte
		copy(k[:], key)
		copy(s[:], signature)
		isOriginal := k == public && node == testNode && uid == testUID && s == proof
		if Verify(k, node, uid, s) != isOriginal {
			t.Errorf("Verify(%x, %q, %q, %x) = %v", k, node, uid, s, !isOriginal)
		}
	})
}

// FuzzSign holds every private key against crypto/ecdh, which WireGuard's public key is.
func FuzzSign(f *testing.F) {
	f.Add(make([]byte, 32), testNode, testUID)
	f.Add([]byte{31: 0xff}, "", "")
	f.Fuzz(func(t *testing.T, key []byte, node, uid string) {
		var private [32]byte
		copy(private[:], key)
		proof, err := Sign(private, node, uid)
		if err != nil {
			t.Fatal(err)
		}
		if !Verify(publicOf(t, private), node, uid, proof) {
			t.Errorf("the proof of %x for %q, %q does not verify", private, node, uid)
		}
	})
}

// BenchmarkVerify is what each peer costs once.
func BenchmarkVerify(b *testing.B) {
	private, public := newKey(b)
	proof, err := Sign(private, testNode, testUID)
	if err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		if !Verify(public, testNode, testUID, proof) {
			b.Fatal("the proof does not verify")
		}
	}
}

func newKey(tb testing.TB) (private, public [32]byte) {
	tb.Helper()
	if _, err := rand.Read(private[:]); err != nil {
		tb.Fatal(err)
	}
	return private, publicOf(tb, private)
}

func publicOf(tb testing.TB, private [32]byte) [32]byte {
	tb.Helper()
	key, err := ecdh.X25519().NewPrivateKey(private[:])
	if err != nil {
		tb.Fatal(err)
	}
	return [32]byte(key.PublicKey().Bytes())
}

func highBit(key [32]byte) [32]byte {
	key[31] |= 0x80
	return key
}

func unhex(t *testing.T, text string) []byte {
	t.Helper()
	raw, err := hex.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}
