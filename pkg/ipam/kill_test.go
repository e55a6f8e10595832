package ipam_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/ipam"
)

// victimDir is the variable that makes the test's program the one that is killed. Its value is the directory of the leases.
const victimDir = "IPAM_VICTIM_DIR"

// killTime is the time since the boot while the victim runs.
const killTime = time.Hour

func TestMain(m *testing.M) {
	dir := os.Getenv(victimDir)
	if dir == "" {
		os.Exit(m.Run())
	}
	if err := victim(dir); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// victim leases, releases and forgets, and tells how far it came. What fails it tries once more, as a runtime does. All its system calls are of
// one thread, so that they can be counted.
func victim(dir string) error {
	runtime.LockOSThread()
	s, err := ipam.Open(dir)
	if err != nil {
		return nil //nolint:nilerr // what was injected
	}
	at(s, killTime)
	leased, err := s.Allocate(killRanges(), owner(1))
	if err == nil {
		fmt.Println(leased[0]) //nolint:forbidigo // tells the test how far it came
	} else if _, getErr := s.Get("c1", "eth0"); getErr == nil {
		return fmt.Errorf("an allocation that failed (%w) left a lease", err)
	}
	if _, err = s.Release("c1", "eth0"); err != nil {
		_, _ = s.Release("c1", "eth0")
	}
	_ = s.Forget(func([]netip.Addr) error { return nil })
	return nil
}

// killRanges are the ranges of the victim: five addresses, and as many as one wants.
func killRanges() []netip.Prefix { return prefixes("10.0.0.8/29", "fd00::/64") }

// TestFaultAtEveryCall kills a process that leases and releases, or fails its call with an error, at each of its system calls that
// touch files, in turn: no address is leased early, none is lost, and a lease is there whole or not at all.
func TestFaultAtEveryCall(t *testing.T) {
	// strace counts the calls of each kind by themselves. What the victim calls how often is the control that it is hit at all.
	least := map[string]int{
		"openat": 7, "write": 2, "pread64": 2, "pwrite64": 2, "flock": 4, "linkat": 2, "renameat": 3, "unlinkat": 3, "utimensat": 3, "mkdirat": 1, "close": 7, "newfstatat": 10,
	}
	faults := map[string]string{
		"killed": "signal=KILL:when=%d", "full": "error=ENOSPC:when=%d", "read-only": "error=EROFS:when=%d", "broken": "error=EIO:when=%d",
		"full from then on": "error=ENOSPC:when=%d+", "read-only from then on": "error=EROFS:when=%d+", "broken from then on": "error=EIO:when=%d+",
	}
	for fault, inject := range faults {
		for kind, calls := range least {
			if kind == "close" && fault != "killed" {
				continue // strace would leave the file open, which the kernel never does
			}
			t.Run(fault+"/"+kind, func(t *testing.T) {
				t.Parallel()
				hit := 0
				for hitAt(t, kind, inject, hit+1) {
					hit++
				}
				if hit < calls {
					t.Errorf("hit %d times, want at least %d", hit, calls)
				}
			})
		}
	}
}

// hitAt has the n-th call of a kind that a victim makes hit by a fault, and says whether there was one.
func hitAt(t *testing.T, kind, inject string, n int) bool {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, calls := t.TempDir(), filepath.Join(t.TempDir(), "calls")
	var cooling []netip.Addr
	if kind != "mkdirat" { // which makes something only in a new directory
		cooling = prepareKill(t, dir)
	}
	cmd := exec.Command("strace", "-f", "-qq", "-o", calls, "-e", "trace="+kind, "-e", "inject="+kind+":"+fmt.Sprintf(inject, n), self)
	cmd.Env = append(os.Environ(), victimDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	unstarted := exit != nil && exit.ExitCode() == 127 // the dynamic linker was hit
	if err != nil && !killed && !unstarted {
		t.Fatalf("%d: %v", n, err)
	}
	if leased := strings.TrimSpace(string(out)); leased != "" {
		cooling = append(cooling, netip.MustParseAddr(leased))
	}
	t.Run(fmt.Sprint(n), func(t *testing.T) { survives(t, dir, cooling) })
	text, err := os.ReadFile(calls)
	if err != nil {
		t.Fatal(err)
	}
	return killed || strings.Contains(string(text), "(INJECTED)")
}

// prepareKill makes a directory in which the victim finds addresses that cool down, and ones that have. It returns the former.
func prepareKill(t *testing.T, dir string) []netip.Addr {
	t.Helper()
	s := open(t, dir)
	passed := at(s, killTime-35*time.Second)
	var all [][]netip.Addr
	for i := range 3 {
		all = append(all, allocate(t, s, killRanges(), owner(10+i)))
	}
	release(t, s, owner(10))
	release(t, s, owner(11))
	passed(25 * time.Second)
	forget(t, s)
	release(t, s, owner(12))
	if err := os.Truncate(filepath.Join(dir, ".lock"), 0); err != nil { // nobody remembers anything
		t.Fatal(err)
	}
	return all[2]
}

// survives checks what the victim left: what has to cool down is not leased, and after a DEL and the cool-down everything is free.
func survives(t *testing.T, dir string, cooling []netip.Addr) {
	t.Helper()
	s := open(t, dir)
	passed := at(s, killTime+19*time.Second)
	forget(t, s)
	n := 100
	drain := func() (got []netip.Addr) {
		for ; ; n++ {
			as, err := s.Allocate(killRanges(), owner(n))
			if err != nil {
				return got
			}
			got = append(got, as...)
		}
	}
	for _, a := range drain() {
		if slices.Contains(cooling, a) {
			t.Errorf("%s was leased early", a)
		}
	}
	release(t, s, owner(1))
	for i := 100; i < n; i++ {
		release(t, s, owner(i))
	}
	if left := names(t, dir); len(left) > 0 && !slices.Equal(left, []string{".new"}) {
		t.Errorf("left %v", left)
	}
	passed(coolDown)
	forget(t, s)
	if got := drain(); len(got) != 2*5 {
		t.Errorf("of five addresses %v are left", got)
	}
}
