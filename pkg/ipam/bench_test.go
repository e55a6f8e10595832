package ipam_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/allocator"
	"github.com/containernetworking/plugins/plugins/ipam/host-local/backend/disk"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/internal/measure"
	"github.com/warren-cni/warren/pkg/ipam"
	"github.com/warren-cni/warren/pkg/lab/soak"
)

// memory returns a directory on a tmpfs, as in production.
func memory(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ipam") //nolint:usetesting // a tmpfs
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// sizes are how many addresses are leased, and the range that they nearly fill.
var sizes = map[int]netip.Prefix{
	250:   netip.MustParsePrefix("10.0.0.0/24"),
	65000: netip.MustParsePrefix("10.0.0.0/16"),
}

// benchOwner is an owner as a kubelet names them.
func benchOwner(i int) ipam.Owner {
	return ipam.Owner{
		ContainerID: fmt.Sprintf("%064x", i), Interface: "eth0", Namespace: "shop",
		Name: fmt.Sprintf("web-7c5ddbdf54-%05d", i), UID: fmt.Sprintf("3f1c9b1e-0000-4000-8000-%012d", i),
	}
}

// filled returns a store in which that many addresses of the range are leased.
func filled(b *testing.B, dir string, n int, r netip.Prefix) (s *ipam.Store, passed func(time.Duration)) {
	b.Helper()
	s, err := ipam.Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	passed = at(s, time.Hour)
	for i := range n {
		if _, err = s.Allocate([]netip.Prefix{r}, benchOwner(i)); err != nil {
			b.Fatal(err)
		}
	}
	return s, passed
}

// timed adds the processor time that a call takes: what else the machine does hardly changes that.
func timed(b *testing.B, sum *time.Duration, call func() error) {
	b.Helper()
	before := measure.CPU()
	if err := call(); err != nil {
		b.Fatal(err)
	}
	*sum += measure.CPU() - before
}

// perOperation reports the mean of a sum in microseconds.
func perOperation(b *testing.B, sum time.Duration, unit string) {
	b.Helper()
	b.ReportMetric(float64(sum.Nanoseconds())/1e3/float64(b.N), unit)
}

// BenchmarkLease leases and releases where that many others are leased, beside the system calls that a file with two names and its
// renaming need at the least, and beside host-local's store on the same file system.
func BenchmarkLease(b *testing.B) {
	for n, r := range sizes {
		b.Run(fmt.Sprintf("leased=%d", n), func(b *testing.B) {
			s, passed := filled(b, memory(b), n, r)
			raw := newRaw(b)
			var leasing, releasing, bare time.Duration
			for b.Loop() {
				timed(b, &leasing, func() error {
					_, err := s.Allocate([]netip.Prefix{r}, benchOwner(n))
					return err
				})
				timed(b, &releasing, func() error {
					_, err := s.Release(benchOwner(n).ContainerID, "eth0")
					return err
				})
				timed(b, &bare, raw)
				passed(coolDown)
				if err := s.Forget(func([]netip.Addr) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
			perOperation(b, leasing, "us/lease")
			perOperation(b, releasing, "us/release")
			perOperation(b, bare, "us/bare")
			b.ReportMetric(float64(leasing+releasing)/float64(bare), "x-bare")
			b.ReportMetric(float64(hostLocal(b, n, r))/(float64(leasing+releasing)/float64(b.N)), "x-host-local")
		})
	}
}

// BenchmarkChoice chooses a free address in memory, behind all that are leased: a lease without its files.
func BenchmarkChoice(b *testing.B) {
	for n, r := range sizes {
		b.Run(fmt.Sprintf("leased=%d", n), func(b *testing.B) {
			const times = 1000 // of what is short for the clock
			choose := ipam.Choose(r, n)
			var choosing time.Duration
			for b.Loop() {
				timed(b, &choosing, func() error {
					for range times {
						if a, err := choose(); err != nil || !a.IsValid() {
							return fmt.Errorf("chose %v: %w", a, err)
						}
					}
					return nil
				})
			}
			perOperation(b, choosing/times, "us/choice")
		})
	}
}

// newRaw returns what makes a lease's file, gives it its names and takes them away, and nothing else: under a lock, with the content
// complete before it has a name, and renamed into its cool-down.
func newRaw(b *testing.B) func() error {
	b.Helper()
	dir := memory(b)
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = unix.Close(fd) })
	content := make([]byte, 250)
	times := make([]unix.Timespec, 2)
	under := func(do ...func() error) error {
		lock, err := unix.Openat(fd, ".lock", unix.O_RDWR|unix.O_CREAT, 0o600)
		if err == nil {
			err = unix.Flock(lock, unix.LOCK_EX)
		}
		for i := 0; err == nil && i < len(do); i++ {
			err = do[i]()
		}
		_ = unix.Close(lock)
		return err
	}
	write := func() error {
		file, err := unix.Openat(fd, ".new", unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL, 0o600)
		if err == nil {
			_, err = unix.Write(file, content)
			_ = unix.Close(file)
		}
		return err
	}
	read := func() error {
		file, err := unix.Openat(fd, "attachment", unix.O_RDONLY, 0)
		if err == nil {
			_, err = unix.Read(file, content)
			_ = unix.Close(file)
		}
		return err
	}
	return func() error {
		err := under(write,
			func() error { return unix.Linkat(fd, ".new", fd, "address", 0) },
			func() error { return unix.Renameat(fd, ".new", fd, "attachment") })
		if err != nil {
			return err
		}
		return under(read,
			func() error { return unix.Unlinkat(fd, "attachment", 0) },
			func() error { return unix.UtimesNanoAt(fd, "address", times, 0) },
			func() error { return unix.Renameat(fd, "address", fd, "cooling") })
	}
}

// hostLocal returns how long host-local's store takes to lease an address and to release it, where that many are leased.
func hostLocal(b *testing.B, n int, r netip.Prefix) time.Duration {
	b.Helper()
	root := memory(b)
	store, err := disk.New("net", root)
	if err != nil {
		b.Fatal(err)
	}
	defer func() { _ = store.Close() }()
	dir := filepath.Join(root, "net")
	a := r.Addr().Next().Next()
	for i := range n {
		if err = os.WriteFile(filepath.Join(dir, a.String()), []byte(benchOwner(i).ContainerID+"\r\neth0"), 0o600); err != nil {
			b.Fatal(err)
		}
		a = a.Next()
	}
	_, subnet, err := net.ParseCIDR(r.String())
	if err != nil {
		b.Fatal(err)
	}
	set := allocator.RangeSet{{Subnet: types.IPNet(*subnet)}}
	if err = set.Canonicalize(); err != nil {
		b.Fatal(err)
	}
	if err = os.WriteFile(filepath.Join(dir, "last_reserved_ip.0"), []byte(a.Prev().String()), 0o600); err != nil {
		b.Fatal(err)
	}
	peer := allocator.NewIPAllocator(&set, store, 0)
	const times = 5
	before := measure.CPU()
	for range times {
		if _, err = peer.Get("c", "eth0", nil); err != nil {
			b.Fatal(err)
		}
		if err = peer.Release("c", "eth0"); err != nil {
			b.Fatal(err)
		}
	}
	return (measure.CPU() - before) / times
}

// BenchmarkReleaseNothing releases for an attachment that has no lease, as a DEL does that comes twice.
func BenchmarkReleaseNothing(b *testing.B) {
	for n, r := range sizes {
		b.Run(fmt.Sprintf("leased=%d", n), func(b *testing.B) {
			s, _ := filled(b, memory(b), n, r)
			var releasing time.Duration
			for b.Loop() {
				timed(b, &releasing, func() error {
					_, err := s.Release("none", "eth0")
					return err
				})
			}
			perOperation(b, releasing, "us/release")
		})
	}
}

// BenchmarkNearlyFull leases in a /16 of which only a few addresses are free, scattered among the others.
func BenchmarkNearlyFull(b *testing.B) {
	for _, free := range []int{1, 100} {
		b.Run(fmt.Sprintf("free=%d", free), func(b *testing.B) {
			const all = 1<<16 - 3
			r := []netip.Prefix{sizes[65000]}
			s, passed := filled(b, memory(b), all, r[0])
			forget := func() {
				passed(coolDown)
				if err := s.Forget(func([]netip.Addr) error { return nil }); err != nil {
					b.Fatal(err)
				}
			}
			random := soak.Random(b)
			for _, i := range random.Perm(all)[:free] {
				if _, err := s.Release(benchOwner(i).ContainerID, "eth0"); err != nil {
					b.Fatal(err)
				}
			}
			forget()
			var leasing time.Duration
			for b.Loop() {
				timed(b, &leasing, func() error {
					_, err := s.Allocate(r, benchOwner(all))
					return err
				})
				if _, err := s.Release(benchOwner(all).ContainerID, "eth0"); err != nil {
					b.Fatal(err)
				}
				forget()
			}
			perOperation(b, leasing, "us/lease")
		})
	}
}

// BenchmarkReplay reads all leases as a daemon that starts does, on all processors, and as a running one that has read them before, beside
// listing the names and reading the files alone.
func BenchmarkReplay(b *testing.B) {
	for n, r := range sizes {
		b.Run(fmt.Sprintf("leased=%d", n), func(b *testing.B) {
			dir := memory(b)
			filled(b, dir, n, r)
			var cold, wall, warm, bare time.Duration
			for b.Loop() {
				s, err := ipam.Open(dir)
				if err != nil {
					b.Fatal(err)
				}
				list := func() error {
					leases, err := s.List()
					if err == nil && len(leases) != n {
						err = fmt.Errorf("%d leases", len(leases))
					}
					return err
				}
				began := b.Elapsed()
				timed(b, &cold, list)
				wall += b.Elapsed() - began
				timed(b, &warm, list)
				timed(b, &bare, func() error { return readAll(dir) })
			}
			b.ReportMetric(float64(cold.Microseconds())/1e3/float64(b.N), "ms/replay")
			b.ReportMetric(float64(wall.Microseconds())/1e3/float64(b.N), "ms/replay-wall")
			b.ReportMetric(float64(warm.Microseconds())/1e3/float64(b.N), "ms/audit")
			b.ReportMetric(float64(bare.Microseconds())/1e3/float64(b.N), "ms/bare")
			b.ReportMetric(float64(cold)/float64(bare), "x-bare")
		})
	}
}

// readAll lists a directory and reads the files of attachments, one after the other, and makes nothing of them.
func readAll(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { _ = d.Close() }()
	names, err := d.Readdirnames(-1)
	if err != nil {
		return err
	}
	buffer := make([]byte, 4096)
	for _, name := range names {
		if len(name) < 64 {
			continue
		}
		file, err := unix.Openat(int(d.Fd()), name, unix.O_RDONLY, 0)
		if err != nil {
			return err
		}
		_, err = unix.Read(file, buffer)
		if _ = unix.Close(file); err != nil {
			return err
		}
	}
	return nil
}
