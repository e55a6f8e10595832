// Package soak says how often a proof tries what one counterexample would refute, and how fast. `make test` runs a tenth of the
// trials that `make soak` runs; WARREN_SOAK in the environment makes the difference. WARREN_TEST_EMULATED says that the
// processor is emulated, as it is in the guest of scripts/vm: it has no time left for anything else while it carries what
// another one hardly notices.
package soak

import (
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// variable holds a seed, or nothing but a word for any; without it the proofs are short.
const variable = "WARREN_SOAK"

// emulated is the variable that says so, and slowness how much slower such a processor is.
const (
	emulated = "WARREN_TEST_EMULATED"
	slowness = 10
)

// Emulated says whether the tests run in a machine of their own, whose processor is emulated.
func Emulated() bool { return os.Getenv(emulated) != "" }

// Spaced is the time between two packets, or as many times that as an emulated processor needs.
func Spaced(every time.Duration) time.Duration {
	if Emulated() {
		return slowness * every
	}
	return every
}

// Patience is how long to wait for what takes at most that long, or a few times that on an emulated processor.
func Patience(limit time.Duration) time.Duration {
	if Emulated() {
		return slowness / 2 * limit
	}
	return limit
}

// Short says whether the proofs are short. They then run beside other tests, and what takes time takes more.
func Short() bool { return os.Getenv(variable) == "" }

// Beside is Patience for what a short run does beside other tests: twice as long there.
func Beside(limit time.Duration) time.Duration {
	if Short() {
		limit *= 2
	}
	return Patience(limit)
}

// Trials is how often something is tried that is tried full times in a soak.
func Trials(full int) int {
	if !Short() {
		return full
	}
	return (full + 9) / 10
}

// Shared is Trials for each of some variants, which share the trials of a short run. A soak runs all of them of each, and an emulated
// processor, which has time for one variant alone, all of that one.
func Shared(full, variants int) int {
	if !Short() || Emulated() {
		return Trials(full)
	}
	return (Trials(full) + variants - 1) / variants
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
