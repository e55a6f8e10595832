package nlattr_test

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/warren-cni/warren/pkg/nlattr"
)

// attribute makes one that says of itself that it is that long.
func attribute(typ uint16, length int, value string) []byte {
	b := binary.NativeEndian.AppendUint16(nil, uint16(length))
	b = append(binary.NativeEndian.AppendUint16(b, typ), value...)
	return append(b, make([]byte, -len(b)&3)...)
}

func TestAll(t *testing.T) {
	whole := slices.Concat(
		attribute(1, 7, "abc"), attribute(2, 4, ""), attribute(3|1<<15, 8, "abcd"), attribute(4|1<<14, 5, "e"),
	)
	for name, c := range map[string]struct {
		message []byte
		want    []string
	}{
		"flags go, the empty one too": {whole, []string{"abc", "abcd", "e"}},
		"without the last padding":    {whole[:len(whole)-3], []string{"abc", "abcd", "e"}},
		"cut short":                   {whole[:len(whole)-4], []string{"abc", "abcd"}},
		"a length below the header":   {attribute(1, 3, "abc"), nil},
		"nothing":                     {nil, nil},
	} {
		var values []string
		var types []uint16
		for typ, v := range nlattr.All(c.message) {
			types, values = append(types, typ), append(values, string(v))
		}
		if !slices.Equal(values, c.want) {
			t.Errorf("%s: values %q, want %q", name, values, c.want)
		}
		if want := []uint16{1, 3, 4}[:len(types)]; !slices.Equal(types, want) {
			t.Errorf("%s: types %v, want %v", name, types, want)
		}
	}
	for range nlattr.All(whole) {
		break // whoever has seen enough may stop
	}
}
