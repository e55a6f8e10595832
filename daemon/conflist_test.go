package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// entries returns the types in a conflist, in their order, and the MTU of ours.
func entries(path string) ([]string, int, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, 0, err
	}
	var list struct {
		Plugins []struct {
			Type string
			MTU  int
		}
	}
	if err = json.Unmarshal(text, &list); err != nil {
		return nil, 0, fmt.Errorf("%w in %q", err, text)
	}
	var types []string
	mtu := 0
	for _, plugin := range list.Plugins {
		types = append(types, plugin.Type)
		mtu = max(mtu, plugin.MTU)
	}
	return types, mtu, nil
}

// The conflist comes last: while the packet filter takes no rule, there is none, however often the daemon tries. It is never seen but
// whole.
func TestConflistComesLast(t *testing.T) {
	t.Parallel()
	s := newStage(t, "wdlast", 1)
	tries := filepath.Join(t.TempDir(), "tries")
	if err := os.WriteFile(tries, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.startTunnel(0)
	s.startDaemon(0, s.restoreBy("#!/bin/sh\n[ -e %[2]s ] || exec %[1]s \"$@\"\necho try >>%[2]s\necho no rules today >&2\nexit 1\n", tries))
	s.problem(0, "FirewallApplyFailed", "node-1")
	s.eventually(func() error {
		text, err := os.ReadFile(tries)
		if strings.Count(string(text), "try") < 4 {
			return fmt.Errorf("it has tried %q (%w)", text, err)
		}
		return nil
	})
	if _, err := os.Stat(s.Nodes[0].Conflist()); !errors.Is(err, os.ErrNotExist) || s.status(0).Ready {
		t.Errorf("without rules there is a conflist (%v), ready is %v", err, s.status(0).Ready)
	}
	if err := os.Remove(tries); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error {
		_, _, err := entries(s.Nodes[0].Conflist())
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the conflist is seen before it is whole: %v", err)
		}
		return err
	})
	s.healthy(0)
}

// What others append to the conflist stays through kills and restarts of the daemon, and where it changes its own entries.
func TestConflistKeepsWhatOthersAppend(t *testing.T) {
	t.Parallel()
	s := running(t, "wdappend", 1)
	path := s.Nodes[0].Conflist()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var list map[string]any
	if err = json.Unmarshal(text, &list); err != nil {
		t.Fatal(err)
	}
	list["plugins"] = slices.Concat([]any{map[string]any{"type": "first"}}, list["plugins"].([]any), []any{
		map[string]any{"type": "istio-cni", "kubernetes": map[string]any{"exclude_namespaces": []string{"istio-system"}}}, map[string]any{"type": "linkerd-cni"},
	})
	appended, err := json.Marshal(list)
	if err == nil {
		err = os.WriteFile(path, appended, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	keeps := func(what string, mtu int) {
		t.Helper()
		s.eventually(func() error {
			_, now, err := entries(path)
			if err == nil && now != mtu {
				err = fmt.Errorf("the MTU is %d, want %d", now, mtu)
			}
			return err
		})
		types, _, err := entries(path)
		if diff := cmp.Diff([]string{"first", "warren", "portmap", "bandwidth", "istio-cni", "linkerd-cni"}, types); diff != "" || err != nil {
			t.Errorf("%s (-want +got):\n%s (%v)", what, diff, err)
		}
		if text, err := os.ReadFile(path); err != nil || !strings.Contains(string(text), "istio-system") {
			t.Errorf("%s: another's entry has lost what it says (%v):\n%s", what, err, text)
		}
	}
	_, mtu, err := entries(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, end := range []func() error{s.daemons[0].Kill, nil} {
		if end == nil {
			end = s.daemons[0].Stop
		}
		if err := end(); err != nil {
			t.Fatal(err)
		}
		s.startDaemon(0, nil)
		s.ready(0)
		keeps("after a restart", mtu)
	}
	if err := s.daemons[0].Stop(); err != nil {
		t.Fatal(err)
	}
	if s.daemons[0], err = s.Nodes[0].StartDaemon(t.Context(), nil, "--mtu", "1400"); err != nil {
		t.Fatal(err)
	}
	keeps("after a change of ours", 1400)
	s.healthy(0)
}

// A network that comes before ours is a problem that names its file, unless it calls our plugin: then it is a note. Its file stays.
func TestNetworkAhead(t *testing.T) {
	t.Parallel()
	s := running(t, "wdahead", 1)
	s.healthy(0)
	dir := filepath.Dir(s.Nodes[0].Conflist())
	write := func(name, text string) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	behind := write("87-podman-bridge.conflist", `{"plugins":[{"type":"bridge"}]}`)
	multus := write("00-multus.conf", `{"capabilities":{"portMappings":true},"cniVersion":"0.3.1","name":"multus-cni-network","clusterNetwork":"/host/etc/cni/net.d/10-warren.conflist","type":"multus-shim"}`)
	s.eventually(func() error {
		if notes := s.status(0).Notes; len(notes) != 1 || !strings.Contains(notes[0], multus) {
			return fmt.Errorf("notes %q", notes)
		}
		return nil
	})
	s.healthy(0) // a note is no problem

	flannel := write("05-flannel.conflist", `{"plugins":[{"type":"flannel"}]}`)
	if p := s.problem(0, aheadCode, flannel); !strings.Contains(p.Message, "no policies") {
		t.Errorf("the problem does not say what follows: %+v", p)
	}
	broken := write("06-broken.conflist", `{"plugins":`)
	s.problem(0, aheadCode, broken)
	for _, file := range []string{flannel, broken} {
		if err := os.Remove(file); err != nil {
			t.Errorf("another CNI's file is gone: %v", err)
		}
	}
	s.healthy(0)
	if err := s.daemons[0].Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Nodes[0].Command(t.Context(), "cleanup"); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{behind, multus} {
		if _, err := os.Stat(file); err != nil {
			t.Errorf("another CNI's file is gone: %v", err)
		}
	}
}
