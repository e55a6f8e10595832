package wgdevice

import "testing"

// The tunnel's process takes half of the processors, and two where two are not half.
func TestProcessors(t *testing.T) {
	for all, want := range map[int]int{1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 3, 8: 4, 64: 32} {
		if got := processors(all); got != want {
			t.Errorf("of %d processors it takes %d, want %d", all, got, want)
		}
	}
}
