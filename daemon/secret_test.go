package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// noCore matches the limits of a process that leaves no core dump.
var noCore = regexp.MustCompile(`(?m)^Max core file size +0 +0 `)

// spellings are the ways in which a private key could stand somewhere.
func spellings(private wgtypes.Key) [][]byte {
	text := private.String()
	return [][]byte{
		private[:], []byte(text), []byte(strings.TrimRight(text, "=")), []byte(base64.URLEncoding.EncodeToString(private[:])),
		[]byte(hex.EncodeToString(private[:])), []byte(strings.ToUpper(hex.EncodeToString(private[:]))),
		[]byte(strings.Trim(fmt.Sprintf("%d", private[:]), "[]")), // as a slice that is logged
	}
}

// tells says whether a text holds one of the spellings.
func tells(text []byte, secrets [][]byte) bool {
	for _, secret := range secrets {
		if bytes.Contains(text, secret) {
			return true
		}
	}
	return false
}

// privateKey reads a node's key, which nobody but root may.
func privateKey(t *testing.T, node *lab.Node) wgtypes.Key {
	t.Helper()
	path := filepath.Join(node.StateDir(), wgdevice.KeyFile)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]fs.FileMode{path: 0o600, node.StateDir(): 0o700 | fs.ModeDir} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s has mode %v (%v), want %v", name, info.Mode(), err, want)
		}
	}
	private, err := wgtypes.ParseKey(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if !tells(text, spellings(private)) {
		t.Error("the search does not find the key in its own file")
	}
	return private
}

// scrape returns what a node's daemon tells on its port of metrics.
func scrape(t *testing.T, node *lab.Node, path string) []byte {
	t.Helper()
	var text []byte
	err := node.Do(func() error {
		connection, err := new(net.Dialer).DialContext(t.Context(), "tcp", "127.0.0.1:9476")
		if err != nil {
			return err
		}
		_, err = io.WriteString(connection, "GET "+path+" HTTP/1.0\r\n\r\n")
		if err == nil {
			text, err = io.ReadAll(connection)
		}
		return errors.Join(err, connection.Close())
	})
	if err != nil || len(text) == 0 {
		t.Fatalf("asking for %s: %q, %v", path, text, err)
	}
	return text
}

// Private keys are in files that only root reads and nowhere else: not in any answer of the commands and of the metrics, in logs, in
// objects, in the files of the runtime, nor in the conflist. They stay so through restarts and a key that changes.
func TestKeysStaySecret(t *testing.T) {
	t.Parallel()
	s := newStage(t, "wdsecret", 2)
	start := func(i int) {
		var err error
		s.daemons[i], err = s.Nodes[i].StartDaemon(t.Context(), nil, "--log-level", "debug", "--metrics-address", "127.0.0.1:9476")
		if err != nil {
			t.Fatal(err)
		}
	}
	for i := range s.Nodes {
		s.startTunnel(i)
		start(i)
	}
	for i := range s.Nodes {
		s.ready(i)
	}
	s.reaches(s.pod(0, "client"), s.pod(1, "server"))
	var secrets [][]byte
	for _, node := range s.Nodes {
		secrets = append(secrets, spellings(privateKey(t, node))...)
	}
	// A key that cannot be used is in no message either.
	path := filepath.Join(s.Nodes[0].StateDir(), wgdevice.KeyFile)
	broken := privateKey(t, s.Nodes[0]).String()[:40]
	good, err := os.ReadFile(path)
	if err = errors.Join(err, s.daemons[0].Stop(), os.WriteFile(path, []byte(broken+"\n"), 0o600)); err != nil {
		t.Fatal(err)
	}
	if answer, err := s.Nodes[0].Command(t.Context(), "run", "--node-name", "node-1", "--objects", s.Objects, "--metrics-address", ""); err == nil ||
		tells([]byte(answer+err.Error()), [][]byte{[]byte(broken)}) {
		t.Errorf("a daemon with a broken key: %s, %v", answer, err)
	}
	if err = os.WriteFile(path, good, 0o600); err != nil {
		t.Fatal(err)
	}
	start(0)
	s.ready(0)

	rotation, err := s.Nodes[0].Command(t.Context(), "rotate-key", "--wait")
	if err != nil {
		t.Fatal(err)
	}
	now := privateKey(t, s.Nodes[0])
	if tells(good, [][]byte{[]byte(now.String())}) || !strings.Contains(rotation, now.PublicKey().String()) {
		t.Errorf("the key did not change: %s", rotation)
	}
	secrets = append(secrets, spellings(now)...)
	if tells([]byte(rotation), secrets) {
		t.Error("the change of a key tells a private key")
	}

	for i, node := range s.Nodes {
		processes := []int{s.daemons[i].PID()}
		if lab.TestedWireGuard() == string(wgdevice.ModeUserspace) { // else the kernel has the tunnel
			processes = append(processes, s.childOf(s.tunnels[i]))
		}
		for _, process := range processes {
			if limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", process)); err != nil || !noCore.Match(limits) {
				t.Errorf("process %d on %s may leave a core dump (%v):\n%s", process, node.Name, err, limits)
			}
		}
		answers := map[string][]byte{"/metrics": scrape(t, node, "/metrics"), "/readyz": scrape(t, node, "/readyz"), "/debug/pprof/cmdline": scrape(t, node, "/debug/pprof/cmdline")}
		answers["render"] = []byte(render(t, s, node))
		// What it proves depends on how busy the machine is; what it says must not.
		proven, err := node.Command(t.Context(), "verify", "--duration", "1s", "-o", "json")
		if !strings.Contains(proven, s.Nodes[1-i].Name) {
			t.Errorf("verify on %s: %q, %v", node.Name, proven, err)
		}
		answers["verify"] = []byte(proven)
		for _, command := range []string{"status", "status -o json", "explain --from shop/client --to shop/server --port 8080"} {
			words := strings.Fields(command)
			answer, err := node.Command(t.Context(), words[0], words[1:]...)
			if err != nil || answer == "" {
				t.Errorf("%s on %s: %q, %v", command, node.Name, answer, err)
			}
			answers[command] = []byte(answer)
		}
		for what, answer := range answers {
			if tells(answer, secrets) {
				t.Errorf("%s of %s tells a private key", what, node.Name)
			}
		}
		if log := s.daemons[i].Log(1 << 20); !strings.Contains(log, "starting") || tells([]byte(log), secrets) || strings.Contains(log, broken) {
			t.Errorf("the log of %s tells a private key, or nothing", node.Name)
		}
	}
	searched := searchFiles(t, filepath.Dir(s.Objects), secrets)
	if searched < 10 {
		t.Errorf("only %d files were searched", searched)
	}
}

// render returns what a node would do.
func render(t *testing.T, s *stage, node *lab.Node) string {
	t.Helper()
	binaries, err := programs.Dir(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	answer, err := node.Run(t.Context(), filepath.Join(binaries, "warrend"), "render", "--objects", s.Objects, "--node", node.Name)
	if err != nil || answer == "" {
		t.Errorf("rendering on %s: %q, %v", node.Name, answer, err)
	}
	return answer
}

// searchFiles demands that no file but those of the keys tells one of the secrets, and returns how many it has read.
func searchFiles(t *testing.T, dir string, secrets [][]byte) (searched int) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.Type().IsRegular() || entry.Name() == wgdevice.KeyFile {
			return err
		}
		text, err := os.ReadFile(path)
		if tells(text, secrets) {
			t.Errorf("%s tells a private key", path)
		}
		searched++
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return searched
}

// Beyond loopback a node listens on the port of WireGuard and on no other.
func TestOnlyWireGuardListens(t *testing.T) {
	t.Parallel()
	s := newStage(t, "wdlisten", 1)
	s.startTunnel(0)
	var err error
	// The defaults of all flags that say where something listens.
	if s.daemons[0], err = s.Nodes[0].StartDaemon(t.Context(), nil, "--metrics-address", "127.0.0.1:9476"); err != nil {
		t.Fatal(err)
	}
	s.ready(0)
	s.pod(0, "pod")
	beyond, loopback := s.listening()
	if got := strings.Join(beyond, ", "); got != "udp 0.0.0.0:51820, udp6 [::]:51820" {
		t.Errorf("beyond loopback it listens on %s", got)
	}
	if got := strings.Join(loopback, ", "); got != "tcp 127.0.0.1:9476" {
		t.Errorf("on loopback it listens on %s", got)
	}
	server, err := lab.NewEcho(t.Context(), s.Nodes[0].Netns(), port)
	if err != nil {
		t.Fatal(err)
	}
	if more, _ := s.listening(); len(more) == len(beyond) {
		t.Error("a server that listens is not seen")
	}
	if err = server.Close(); err != nil {
		t.Error(err)
	}
}

// listening returns where sockets of the first node wait for what somebody sends: those that listen, and those without another end.
func (s *stage) listening() (beyond, loopback []string) {
	s.t.Helper()
	for _, protocol := range []string{"tcp", "tcp6", "udp", "udp6", "raw", "raw6"} {
		table, err := s.Nodes[0].Run(s.t.Context(), "cat", "/proc/net/"+protocol)
		if err != nil {
			s.t.Fatal(err)
		}
		for line := range strings.Lines(table) {
			const listens, alone = "0A", "07"
			fields := strings.Fields(line)
			if fields[3] != listens && fields[3] != alone {
				continue // the heading, or a connection
			}
			at := socketAddress(s.t, fields[1])
			if text := protocol + " " + at.String(); at.Addr().IsLoopback() {
				loopback = append(loopback, text)
			} else {
				beyond = append(beyond, text)
			}
		}
	}
	return beyond, loopback
}

// socketAddress reads an address of those tables: words of four bytes, of which the last comes first, and the port (proc(5)).
func socketAddress(t *testing.T, text string) netip.AddrPort {
	t.Helper()
	address, number, _ := strings.Cut(text, ":")
	raw, err := hex.DecodeString(address)
	if err != nil {
		t.Fatal(err)
	}
	for word := range slices.Chunk(raw, 4) {
		slices.Reverse(word)
	}
	port, err := strconv.ParseUint(number, 16, 16)
	at, ok := netip.AddrFromSlice(raw)
	if err != nil || !ok {
		t.Fatalf("%s is no address of a socket: %v", text, err)
	}
	return netip.AddrPortFrom(at, uint16(port))
}
