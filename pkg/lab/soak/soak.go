// Package soak says how often a proof tries what one counterexample would refute. `make test` runs a tenth of the trials that
// `make soak` runs; WARREN_SOAK in the environment makes the difference.
package soak

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
)

// variable holds a seed, or nothing but a word for any; without it the proofs are short.
const variable = "WARREN_SOAK"

// Trials is how often something is tried that is tried full times in a soak.
func Trials(full int) int {
	if os.Getenv(variable) != "" {
		return full
	}
	return (full + 9) / 10
}

// Random returns a source of random numbers and prints its seed, which WARREN_SOAK can name to have the same numbers again.
func Random(tb testing.TB) *rand.Rand {
	tb.Helper()
	seed, err := strconv.ParseUint(os.Getenv(variable), 10, 64)
	if err != nil || seed < 2 {
		seed = rand.Uint64() //nolint:gosec // no secret
	}
	tb.Logf("seed %d (%s=%d)", seed, variable, seed)
	return rand.New(rand.NewPCG(seed, 0)) //nolint:gosec // no secret
}
