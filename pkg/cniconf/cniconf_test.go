package cniconf_test

import (
	"encoding/json"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/cniconf"
)

func params(runDir string) cniconf.Params {
	return cniconf.Params{
		RunDir: runDir,
		Ranges: []netip.Prefix{netip.MustParsePrefix("10.244.1.0/24"), netip.MustParsePrefix("fd00:10:244:1::/64")},
		MTU:    1420,
	}
}

// types returns the plugin types of a conflist, in order.
func types(t *testing.T, data []byte) []string {
	t.Helper()
	var list struct {
		Plugins []struct {
			Type string `json:"type"`
		} `json:"plugins"`
	}
	if err := json.Unmarshal(data, &list); err != nil {
		t.Fatalf("parsing the conflist: %v\n%s", err, data)
	}
	var names []string
	for _, p := range list.Plugins {
		names = append(names, p.Type)
	}
	return names
}

func TestRenderIsTakenByLibcni(t *testing.T) {
	data, err := cniconf.Render(nil, params("/run/warren"))
	if err != nil {
		t.Fatal(err)
	}
	list, err := libcni.NetworkConfFromBytes(data)
	if err != nil {
		t.Fatalf("libcni refuses the conflist: %v\n%s", err, data)
	}
	if list.Name != "warren" || list.CNIVersion != "1.1.0" {
		t.Errorf("libcni sees name %q version %q, want warren 1.1.0 (the newest of cniVersions)", list.Name, list.CNIVersion)
	}
	if !strings.Contains(string(data), `"cniVersion": "1.0.0"`) {
		t.Errorf("the conflist must say cniVersion 1.0.0 for containerd 1.6:\n%s", data)
	}
	if diff := cmp.Diff([]string{"warren", "portmap", "bandwidth"}, types(t, data)); diff != "" {
		t.Errorf("plugins (-want +got):\n%s", diff)
	}
}

func TestRenderKeepsEntriesOfOthers(t *testing.T) {
	for name, tc := range map[string]struct {
		existing string
		want     []string
	}{
		"appended":    {`{"plugins":[{"type":"warren"},{"type":"portmap"},{"type":"bandwidth"},{"type":"istio-cni","x":1},{"type":"linkerd-cni"}]}`, []string{"warren", "portmap", "bandwidth", "istio-cni", "linkerd-cni"}},
		"in between":  {`{"plugins":[{"type":"warren"},{"type":"istio-cni","x":1},{"type":"portmap"},{"type":"bandwidth"}]}`, []string{"warren", "istio-cni", "portmap", "bandwidth"}},
		"ours absent": {`{"plugins":[{"type":"istio-cni","x":1}]}`, []string{"warren", "portmap", "bandwidth", "istio-cni"}},
		"some absent": {`{"plugins":[{"type":"warren"},{"type":"istio-cni","x":1}]}`, []string{"warren", "portmap", "bandwidth", "istio-cni"}},
	} {
		t.Run(name, func(t *testing.T) {
			data, err := cniconf.Render([]byte(tc.existing), params("/run/warren"))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tc.want, types(t, data)); diff != "" {
				t.Errorf("plugins (-want +got):\n%s", diff)
			}
			if !strings.Contains(string(data), `"x": 1`) {
				t.Errorf("the foreign entry lost its fields:\n%s", data)
			}
			again, err := cniconf.Render(data, params("/run/warren"))
			if err != nil || string(again) != string(data) {
				t.Errorf("rendering again changes the file (err %v)", err)
			}
		})
	}
}

func TestInstall(t *testing.T) {
	dir, runDir := t.TempDir(), t.TempDir()
	for i, want := range []bool{true, false} {
		changed, err := cniconf.Install(dir, params(runDir))
		if err != nil || changed != want {
			t.Fatalf("install %d: changed %v err %v, want changed %v", i, changed, err, want)
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 1 {
		t.Fatalf("files %v err %v, want the conflist alone", files, err)
	}
}

func TestInstallSetsAnUnparsableFileAside(t *testing.T) {
	dir, runDir := t.TempDir(), t.TempDir()
	path := filepath.Join(dir, cniconf.FileName)
	if err := os.WriteFile(path, []byte("{not json"), 0o600); err != nil {
		t.Fatal(err)
	}
	changed, err := cniconf.Install(dir, params(runDir))
	if !changed || err == nil || !strings.Contains(err.Error(), path+".broken") {
		t.Fatalf("changed %v err %v, want the file replaced and an error that names the copy", changed, err)
	}
	kept, err := os.ReadFile(path + ".broken")
	if err != nil || string(kept) != "{not json" {
		t.Errorf("copy %q err %v", kept, err)
	}
	if changed, err := cniconf.Install(dir, params(runDir)); changed || err != nil {
		t.Errorf("second install: changed %v err %v", changed, err)
	}
}

func TestRemoveStaleOnlyAfterAReboot(t *testing.T) {
	dir, runDir := t.TempDir(), t.TempDir()
	path := filepath.Join(dir, cniconf.FileName)
	if _, err := cniconf.Install(dir, params(runDir)); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data = []byte(strings.Replace(string(data), `"plugins": [`, `"plugins": [{"type":"early"},`, 1))
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}

	if removed, err := cniconf.RemoveStale(dir, runDir); removed || err != nil {
		t.Fatalf("same boot: removed %v err %v, want the conflist left alone", removed, err)
	}
	runDir = t.TempDir() // a reboot empties the run directory
	if removed, err := cniconf.RemoveStale(dir, runDir); !removed || err != nil {
		t.Fatalf("after a reboot: removed %v err %v", removed, err)
	}
	if _, err := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"}); err != nil {
		t.Fatal(err)
	}
	if files, _ := libcni.ConfFiles(dir, []string{".conf", ".conflist", ".json"}); len(files) != 0 {
		t.Fatalf("the runtime still finds %v", files)
	}
	if _, err := cniconf.Install(dir, params(runDir)); err != nil {
		t.Fatal(err)
	}
	data, err = os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"early", "warren", "portmap", "bandwidth"}, types(t, data)); diff != "" {
		t.Errorf("the foreign entry did not survive the reboot (-want +got):\n%s", diff)
	}
}
