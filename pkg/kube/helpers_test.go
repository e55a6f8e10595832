package kube

import (
	"net/netip"
	"reflect"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/warren-cni/warren/pkg/cluster"
)

// compared are the ways in which values of pkg/cluster compare.
func compared() cmp.Options {
	selectors := reflect.TypeFor[labels.Selector]()
	return cmp.Options{
		cmp.Comparer(func(a, b netip.Addr) bool { return a == b }),
		cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }),
		cmp.Comparer(func(a, b netip.AddrPort) bool { return a == b }),
		cmp.Transformer("text", func(s labels.Selector) string {
			if s == nil {
				return "none"
			}
			return "selector " + s.String()
		}),
		// A selector is a slice inside, and an empty one selects everything: that is not the same as none.
		cmp.FilterPath(func(p cmp.Path) bool { return !p.Last().Type().Implements(selectors) }, cmpopts.EquateEmpty()),
	}
}

// fieldsOf lists the fields that problems name.
func fieldsOf(problems []cluster.Problem) []string {
	var paths []string
	for _, p := range problems {
		paths = append(paths, p.Field)
	}
	return paths
}

func checkEqual(t *testing.T, what string, want, got any) {
	t.Helper()
	if diff := cmp.Diff(want, got, compared()); diff != "" {
		t.Errorf("%s (-want +got):\n%s", what, diff)
	}
}

func prefix(text string) netip.Prefix { return netip.MustParsePrefix(text) }

func addr(text string) netip.Addr { return netip.MustParseAddr(text) }

func selector(t *testing.T, text string) labels.Selector {
	t.Helper()
	s, err := labels.Parse(text)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
