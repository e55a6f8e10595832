package cniconf_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cniconf"
)

// Files that a runtime reads before ours are found, and those among them that call our plugin are told from the others.
func TestAheadOf(t *testing.T) {
	const (
		calls    = "delegates"
		replaces = "replaces ours"
		broken   = "broken"
	)
	for name, tc := range map[string]struct{ file, text, want string }{
		"Multus, thin":                {"00-multus.conf", `{"type":"multus","delegates":[{"name":"warren","plugins":[{"type":"warren"},{"type":"portmap"}]}]}`, calls},
		"Multus, plain delegate":      {"00-multus.conf", `{"type":"multus","delegates":[{"type":"warren"}]}`, calls},
		"Multus, a chain of its own":  {"00-multus.conflist", `{"plugins":[{"type":"multus","delegates":[{"plugins":[{"type":"warren"}]}]},{"type":"tuning"}]}`, calls},
		"Multus, thick":               {"00-multus.conf", `{"capabilities":{"portMappings":true},"cniVersion":"0.3.1","logLevel":"verbose","logToStderr":true,"name":"multus-cni-network","clusterNetwork":"/host/etc/cni/net.d/10-warren.conflist","type":"multus-shim"}`, calls},
		"Multus, thick, on another":   {"00-multus.conf", `{"capabilities":{"portMappings":true},"cniVersion":"0.3.1","logLevel":"verbose","logToStderr":true,"name":"multus-cni-network","clusterNetwork":"/host/etc/cni/net.d/10-flannel.conflist","type":"multus-shim"}`, replaces},
		"Multus, thick, on nothing":   {"00-multus.conf", `{"name":"multus-cni-network","type":"multus-shim","socketDir":"/run/multus/"}`, replaces},
		"Multus, the file's path":     {"00-multus.conf", `{"type":"multus","clusterNetwork":"/etc/cni/net.d/10-warren.conflist"}`, calls},
		"Multus, the network's name":  {"00-multus.conf", `{"type":"multus","clusterNetwork":"warren"}`, calls},
		"Multus, the file's name":     {"00-multus.conf", `{"type":"multus","clusterNetwork":"10-warren"}`, calls},
		"Multus on another network":   {"00-multus.conf", `{"type":"multus","clusterNetwork":"10-flannel","delegates":[{"plugins":[{"type":"flannel"}]}]}`, replaces},
		"Istio's own file":            {"02-istio-cni.conflist", `{"name":"warren","plugins":[{"type":"warren"},{"type":"portmap"},{"type":"bandwidth"},{"type":"istio-cni"}]}`, calls},
		"Istio without a network":     {"02-istio-cni.conf", `{"type":"istio-cni"}`, replaces},
		"another CNI":                 {"10-flannel.conflist", `{"plugins":[{"type":"flannel","delegate":{"type":"bridge"}},{"type":"portmap"}]}`, replaces},
		"another CNI, named like us":  {"05-warren.conflist", `{"name":"warren","plugins":[{"type":"bridge"}]}`, replaces},
		"another's clusterNetwork":    {"05-bridge.json", `{"type":"bridge","clusterNetwork":"warren"}`, replaces},
		"our type in a foreign place": {"05-bridge.json", `{"type":"bridge","ipam":{"type":"warren"}}`, replaces},
		"cut short":                   {"05-other.conflist", `{"plugins":[{"type":"war`, broken},
		"empty":                       {"05-other.conflist", ``, broken},
		"not an object":               {"05-other.conflist", `7`, replaces},
		"behind ours":                 {"87-podman.conflist", `{"plugins":[{"type":"bridge"}]}`, ""},
		"ours":                        {cniconf.FileName, `{"plugins":[{"type":"warren"}]}`, ""},
		"not a configuration":         {"00-README.md", `read me`, ""},
		"set aside":                   {".10-warren.conflist.earlier", `{}`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, tc.file)
			if err := os.WriteFile(path, []byte(tc.text), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(dir, "00-folder.conf"), 0o700); err != nil {
				t.Fatal(err)
			}
			found, err := cniconf.AheadOf(dir)
			if err != nil {
				t.Fatal(err)
			}
			var got []string
			for _, one := range found {
				switch {
				case one.Path != path:
					t.Errorf("found %s", one.Path)
				case one.Err != nil:
					got = append(got, broken)
				case one.Delegates:
					got = append(got, calls)
				default:
					got = append(got, replaces)
				}
			}
			if diff := cmp.Diff(tc.want, strings.Join(got, ", ")); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
	if found, err := cniconf.AheadOf(filepath.Join(t.TempDir(), "none")); err != nil || len(found) > 0 {
		t.Errorf("no directory: %v, %v", found, err)
	}
	if _, err := cniconf.AheadOf(os.DevNull); err == nil {
		t.Error("what cannot be read has nothing ahead")
	}
}
