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

// victim leases and releases. All its system calls are of one thread, so that they can be counted.
func victim(dir string) error {
	runtime.LockOSThread()
	s, err := ipam.Open(dir)
	if err != nil {
		return err
	}
	at(s, killTime)
	leased, err := s.Allocate(killRanges(), owner(1))
	if err != nil {
		return err
	}
	fmt.Println(leased[0]) //nolint:forbidigo // tells the test how far it came
	_, err = s.Release("c1", "eth0")
	return err
}

// killRanges are the ranges of the victim: five addresses, and as many as one wants.
func killRanges() []netip.Prefix { return prefixes("10.0.0.8/29", "fd00::/64") }

// TestKilledAtEveryCall kills a process that leases and releases at each of its system calls that touch files, in turn: no
// address is leased early, and none is lost.
func TestKilledAtEveryCall(t *testing.T) {
	// strace counts the calls of each kind by themselves. What the victim calls how often is the control that it is killed at all.
	least := map[string]int{"openat": 8, "write": 4, "flock": 2, "linkat": 2, "renameat": 3, "unlinkat": 3, "utimensat": 3, "close": 8}
	for kind, calls := range least {
		t.Run(kind, func(t *testing.T) {
			killed := 0
			for killedAt(t, kind, killed+1) {
				killed++
			}
			if killed < calls {
				t.Errorf("killed %d times, want at least %d", killed, calls)
			}
		})
	}
}

// killedAt kills a victim at its n-th call of a kind, and says whether there was one.
func killedAt(t *testing.T, kind string, n int) bool {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cooling := prepareKill(t, dir)
	cmd := exec.Command("strace", "-f", "-qq", "-o", "/dev/null", "-e", fmt.Sprintf("inject=%s:signal=KILL:when=%d", kind, n), self)
	cmd.Env = append(os.Environ(), victimDir+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	killed := errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL
	if err != nil && !killed {
		t.Fatal(err)
	}
	if leased := strings.TrimSpace(string(out)); leased != "" {
		cooling = append(cooling, netip.MustParseAddr(leased))
	}
	t.Run(fmt.Sprint(n), func(t *testing.T) { survives(t, dir, cooling) })
	return killed
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
	release(t, s, owner(12))
	cursors, err := filepath.Glob(filepath.Join(dir, ".last-*"))
	if err != nil || len(cursors) != 2 {
		t.Fatal(cursors, err)
	}
	for _, c := range cursors {
		if err = os.Remove(c); err != nil {
			t.Fatal(err)
		}
	}
	return all[2]
}

// survives checks what the victim left: what has to cool down is not leased, and after a DEL and the cool-down everything is free.
func survives(t *testing.T, dir string, cooling []netip.Addr) {
	t.Helper()
	s := open(t, dir)
	passed := at(s, killTime+19*time.Second)
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
	if got := drain(); len(got) != 2*5 {
		t.Errorf("of five addresses %v are left", got)
	}
}
