package ipam_test

import (
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/ipam"
)

// nowhere leads to no address, and everywhere to each.
func nowhere(netip.Addr) (bool, error)    { return false, nil }
func everywhere(netip.Addr) (bool, error) { return true, nil }

// write puts something into a directory.
func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// repair repairs and returns the names of what was moved.
func repair(t *testing.T, s *ipam.Store, stands func(netip.Addr) (bool, error)) (moved []string) {
	t.Helper()
	before := setAside(t, s)
	if _, err := s.Repair(stands); err != nil {
		t.Error(err)
	}
	for _, path := range setAside(t, s) {
		if !slices.Contains(before, path) {
			moved = append(moved, filepath.Base(path))
		}
	}
	slices.Sort(moved)
	return moved
}

// setAside returns the paths of what is set aside.
func setAside(t *testing.T, s *ipam.Store) []string {
	t.Helper()
	paths, err := s.Aside()
	if err != nil {
		t.Error(err)
	}
	for _, path := range paths {
		if _, err = os.Lstat(path); err != nil {
			t.Error(err)
		}
	}
	return paths
}

// foreign puts what is none of ours at a path.
func foreign() map[string]func(path string) error {
	return map[string]func(path string) error{
		"file":      func(path string) error { return os.WriteFile(path, []byte("hello"), 0o600) },
		"empty":     func(path string) error { return os.WriteFile(path, nil, 0o600) },
		"directory": func(path string) error { return os.MkdirAll(filepath.Join(path, "x"), 0o700) },
		"pipe":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		"link":      func(path string) error { return os.Symlink("/dev/zero", path) },
		"elsewhere": func(path string) error { return os.Symlink("/proc", path) },
		"dangling":  func(path string) error { return os.Symlink("/nowhere", path) },
		"socket":    func(path string) error { return unix.Mknod(path, unix.S_IFSOCK|0o600, 0) },
	}
}

// Whatever is in the directory keeps nobody from leasing, listing and releasing, and is set aside; also where that has no directory yet,
// because something else is in its place.
func TestForeignFilesBlockNothing(t *testing.T) {
	for kind, put := range foreign() {
		for _, name := range []string{
			"notes", ".notes", "c9@eth0", "@", "10.0.0.2", "fd00::2", "FD00::3", ".new", ".cooling", ".boot", ".lock", ".aside",
			".cooling/notes", ".cooling/10.0.0.2", ".cooling/fd00::2",
		} {
			t.Run(kind+"/"+name, func(t *testing.T) {
				dir := t.TempDir()
				if err := put(under(t, dir, name)); err != nil {
					t.Fatal(err)
				}
				blocksNothing(t, dir)
			})
			for _, other := range []string{"file", "elsewhere", "dangling"} {
				if name == ".aside" {
					continue
				}
				t.Run(kind+"/"+name+"/.aside/"+other, func(t *testing.T) {
					dir := t.TempDir()
					if err := errors.Join(put(under(t, dir, name)), foreign()[other](filepath.Join(dir, ".aside"))); err != nil {
						t.Fatal(err)
					}
					blocksNothing(t, dir)
					for _, path := range []string{".aside/.aside.aside-*", ".aside"} { // it stays where nothing had to be set aside
						if found, err := filepath.Glob(filepath.Join(dir, path)); err != nil {
							t.Error(err)
						} else if len(found) == 1 && isNoDirectory(found[0]) {
							return
						}
					}
					t.Error("what was in the place of .aside is lost")
				})
			}
		}
	}
}

// under returns the path of a name in the store's directory, and makes the directory of what cools down where it is there.
func under(t *testing.T, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

func isNoDirectory(path string) bool {
	file, err := os.Lstat(path)
	return err == nil && !file.IsDir()
}

// blocksNothing goes through a lease's life where something foreign is in the directory.
func blocksNothing(t *testing.T, dir string) {
	t.Helper()
	s := open(t, dir)
	if _, err := s.StartBoot(); err != nil {
		t.Error(err)
	}
	if err := s.Room(prefixes("10.0.0.0/24")); err != nil {
		t.Error(err)
	}
	leased := allocate(t, s, prefixes("10.0.0.0/24", "fd00::/64"), owner(1))
	repair(t, s, nowhere)
	if leases, err := s.List(); err != nil || len(leases) != 1 {
		t.Errorf("leases %v, %v", leases, err)
	}
	if owners, err := s.Owners(); err != nil || !slices.Equal(owners, []ipam.Owner{owner(1)}) {
		t.Errorf("owners %v, %v", owners, err)
	}
	if diff := cmp.Diff(leased, release(t, s, owner(1)), equal); diff != "" {
		t.Errorf("released (-want +got):\n%s", diff)
	}
	repair(t, s, nowhere) // what was in the place of .aside when the first set something aside
	left := slices.DeleteFunc(names(t, dir), func(name string) bool { return name == ".aside" || name == ".boot" })
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// What is in the place that an address has while it cools down is kept, whether it is there before the lease or comes with it; the address
// cools down all the same.
func TestForeignAmongWhatCoolsDown(t *testing.T) {
	ranges := prefixes("10.0.0.0/24", "fd00::/64")
	for kind, put := range foreign() {
		if kind == "file" || kind == "empty" { // which are as those of addresses
			continue
		}
		for _, when := range []string{"before", "with"} {
			t.Run(kind+"/"+when, func(t *testing.T) {
				dir := t.TempDir()
				s := open(t, dir)
				var kept []os.FileInfo
				place := func() {
					for _, a := range []string{"10.0.0.2", "fd00::2"} {
						path := under(t, dir, ".cooling/"+a)
						if err := put(path); err != nil {
							t.Fatal(err)
						}
						file, err := os.Lstat(path)
						if err != nil {
							t.Fatal(err)
						}
						kept = append(kept, file)
					}
				}
				if when == "before" {
					place()
				}
				leased := allocate(t, s, ranges, owner(1))
				if when == "with" {
					place()
				}
				if diff := cmp.Diff(leased, release(t, s, owner(1)), equal); diff != "" {
					t.Errorf("released (-want +got):\n%s", diff)
				}
				for i, a := range []string{"10.0.0.2", "fd00::2"} {
					if file, err := os.Lstat(filepath.Join(dir, ".aside", a)); err != nil || !os.SameFile(kept[i], file) {
						t.Errorf("set aside for %s is another, %v", a, err)
					}
				}
				if diff := cmp.Diff([]string{"10.0.0.2", "fd00::2"}, cooling(t, dir)); diff != "" {
					t.Errorf("cools down (-want +got):\n%s", diff)
				}
			})
		}
	}
}

// What is in the place of the store's directory is kept beside it, whoever else finds it at the same time: all lease in one directory.
func TestForeignDirectory(t *testing.T) {
	for kind, put := range foreign() {
		if kind == "directory" || kind == "elsewhere" || kind == "dangling" { // these are directories, or may be again
			continue
		}
		t.Run(kind, func(t *testing.T) {
			for range 20 {
				dir := t.TempDir()
				path := filepath.Join(dir, "ipam")
				if err := put(path); err != nil {
					t.Fatal(err)
				}
				before, err := os.Lstat(path)
				if err != nil {
					t.Fatal(err)
				}
				var group sync.WaitGroup
				for i := range 16 {
					group.Go(func() {
						s, err := ipam.Open(path)
						if err == nil {
							_, err = s.Allocate(prefixes("10.0.0.0/24"), owner(i))
						}
						if err != nil {
							t.Error(err)
						}
					})
				}
				group.Wait()
				if leases, err := open(t, path).List(); err != nil || len(leases) != 16 {
					t.Errorf("%d leases, %v", len(leases), err)
				}
				kept := setAside(t, open(t, path))
				if len(kept) != 1 {
					t.Fatalf("kept %q", kept)
				}
				if after, err := os.Lstat(kept[0]); err != nil || !os.SameFile(before, after) {
					t.Errorf("kept another: %v", err)
				}
			}
		})
	}
}

// A link to a directory that is missing is an error: the leases may be there again.
func TestDanglingDirectory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ipam")
	if err := os.Symlink("/nowhere", path); err != nil {
		t.Fatal(err)
	}
	if _, err := ipam.Open(path); err == nil || !strings.Contains(err.Error(), "a link to what does not exist") {
		t.Errorf("got %v", err)
	}
	if to, err := os.Readlink(path); to != "/nowhere" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
}

// A link to a directory is one: whoever made it wants the leases there.
func TestLinkedDirectory(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(t.TempDir(), "ipam")
	if err := os.Symlink(dir, path); err != nil {
		t.Fatal(err)
	}
	allocate(t, open(t, path), prefixes("10.0.0.0/24"), owner(1))
	if leases, err := open(t, dir).List(); err != nil || len(leases) != 1 {
		t.Errorf("leases %v, %v", leases, err)
	}
}

// Whoever finds something in the place of the lock's file at the same time takes away nobody's new lock: one after the other leases.
func TestForeignLockIsReplacedOnce(t *testing.T) {
	for range 20 {
		dir := t.TempDir()
		if err := os.Mkdir(filepath.Join(dir, ".lock"), 0o700); err != nil {
			t.Fatal(err)
		}
		var group sync.WaitGroup
		for i := range 16 {
			s := open(t, dir)
			group.Go(func() {
				if _, err := s.Allocate(prefixes("10.0.0.0/24"), owner(i)); err != nil {
					t.Error(err)
				}
			})
		}
		group.Wait()
		aside, err := os.ReadDir(filepath.Join(dir, ".aside"))
		if err != nil || len(aside) != 1 {
			t.Errorf("set aside: %v, %v", aside, err)
		}
		if leases, err := open(t, dir).List(); err != nil || len(leases) != 16 {
			t.Errorf("%d leases, %v", len(leases), err)
		}
	}
}

// What is set aside is kept as it was, also a second time.
func TestSetAsideIsKept(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	for i, want := range []string{"notes", "notes.1", "notes.2"} {
		write(t, dir, "notes", want)
		if diff := cmp.Diff([]string{want}, repair(t, s, nowhere)); diff != "" {
			t.Errorf("%d: moved (-want +got):\n%s", i, diff)
		}
		if text, err := os.ReadFile(filepath.Join(dir, ".aside", want)); err != nil || string(text) != want {
			t.Errorf("%s holds %q, %v", want, text, err)
		}
	}
	if moved := repair(t, s, nowhere); len(moved) > 0 {
		t.Errorf("moved %v", moved)
	}
}

// A lease whose content is lost is still known by its names: nobody gets its addresses, and they end with its attachment.
func TestLostContentFreesNothing(t *testing.T) {
	ranges := prefixes("10.0.0.8/29", "fd00::/126")
	for name, text := range map[string]string{
		"cut off": `{"containerID":"c1","interf`, "empty": "", "garbage": "\x00\xff",
		"another's": `{"containerID":"c7","interface":"eth0","addresses":["10.0.0.99"]}`,
		"a path":    `{"containerID":"c1","interface":"eth0","addresses":["fd00::2%/../../x"]}`,
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			passed := at(s, 0)
			held := allocate(t, s, ranges, owner(1))
			write(t, dir, "c1@eth0", text) // all its names are one file
			if moved := repair(t, s, nowhere); len(moved) > 0 {
				t.Errorf("moved %v", moved)
			}
			if owners, err := s.Owners(); err != nil || !slices.Equal(owners, []ipam.Owner{{ContainerID: "c1", Interface: "eth0"}}) {
				t.Errorf("owners %v, %v", owners, err)
			}
			if _, err := s.List(); err == nil || !strings.Contains(err.Error(), "c1@eth0") {
				t.Errorf("error %v, want one that names the file", err)
			}
			if as := allocate(t, s, ranges, owner(2)); as[0] == held[0] || as[1] == held[1] {
				t.Errorf("leased %v, which %v holds", as, held)
			}
			passed(coolDown)
			forget(t, s)
			if _, err := s.Allocate(ranges, owner(3)); !errors.As(err, new(*ipam.ExhaustedError)) {
				t.Errorf("leased from the exhausted range, %v", err)
			}
			if diff := cmp.Diff(held, release(t, s, owner(1)), equal); diff != "" {
				t.Errorf("released (-want +got):\n%s", diff)
			}
			passed(coolDown)
			forget(t, s)
			if diff := cmp.Diff(held[1:], allocate(t, s, prefixes("fd00::/126"), owner(4)), equal); diff != "" {
				t.Errorf("leased again (-want +got):\n%s", diff)
			}
		})
	}
}

// A lease whose text is another one, whatever that says, frees nothing of others, and ends with all that is its own.
func TestOtherContentFreesNothingOfOthers(t *testing.T) {
	ranges := prefixes("10.0.0.0/29", "fd00::/64")
	for name, tt := range map[string]struct {
		text string
		of   int // whose DEL comes
		ends []netip.Addr
	}{
		"another's address":   {`{"containerID":"c1","interface":"eth0","addresses":["10.0.0.3"]}`, 1, addresses("10.0.0.2", "fd00::2")},
		"another's addresses": {`{"containerID":"c1","interface":"eth0","addresses":["10.0.0.3","fd00::3"]}`, 1, addresses("10.0.0.2", "fd00::2")},
		"one's own, and another's": {
			`{"containerID":"c1","interface":"eth0","addresses":["10.0.0.2","fd00::3"]}`, 1, addresses("10.0.0.2", "fd00::2"),
		},
		"fewer":               {`{"containerID":"c1","interface":"eth0","addresses":["10.0.0.2"]}`, 1, addresses("10.0.0.2", "fd00::2")},
		"one twice":           {`{"containerID":"c1","interface":"eth0","addresses":["10.0.0.2","10.0.0.2"]}`, 1, addresses("10.0.0.2", "fd00::2")},
		"none":                {`{"containerID":"c1","interface":"eth0","addresses":[""]}`, 1, addresses("10.0.0.2", "fd00::2")},
		"another attachment":  {`{"containerID":"c7","interface":"eth0","addresses":["10.0.0.2"]}`, 7, nil},
		"another's, replaced": {`{"containerID":"c2","interface":"eth0","addresses":["10.0.0.2","fd00::2"]}`, 2, addresses("10.0.0.3", "fd00::3")},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			passed := at(s, 0)
			allocate(t, s, ranges, owner(1))
			allocate(t, s, ranges, owner(2))
			write(t, dir, "c1@eth0", tt.text) // all its names are one file
			if moved := repair(t, s, nowhere); len(moved) > 0 {
				t.Errorf("moved %v", moved)
			}
			held, err := s.Held(owner(tt.of).ContainerID, "eth0")
			if diff := cmp.Diff(tt.ends, held, equal); diff != "" || err != nil {
				t.Errorf("held (-want +got):\n%s, %v", diff, err)
			}
			if diff := cmp.Diff(tt.ends, release(t, s, owner(tt.of)), equal); diff != "" {
				t.Errorf("released (-want +got):\n%s", diff)
			}
			passed(coolDown)
			forget(t, s)
			var free []netip.Addr
			for i := 10; ; i++ {
				as, err := s.Allocate(ranges[:1], owner(i))
				if errors.As(err, new(*ipam.ExhaustedError)) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				free = append(free, as...)
			}
			for _, a := range addresses("10.0.0.2", "10.0.0.3") {
				if slices.Contains(free, a) != slices.Contains(tt.ends, a) {
					t.Errorf("%s: leased %v again, where there ended %v", a, free, tt.ends)
				}
			}
		})
	}
}

// A file that names only addresses of others holds none, and is set aside; those stay with whom they belong to.
func TestLeaseOfOthersAddresses(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	allocate(t, s, prefixes("10.0.0.0/24"), owner(1))
	write(t, dir, "c7@eth0", `{"containerID":"c7","interface":"eth0","addresses":["10.0.0.2"]}`)
	if _, err := s.List(); err == nil || !strings.Contains(err.Error(), "no address that it names is its own") {
		t.Errorf("got %v, want an error: the control fails", err)
	}
	if diff := cmp.Diff([]string{"c7@eth0"}, repair(t, s, nowhere)); diff != "" {
		t.Errorf("moved (-want +got):\n%s", diff)
	}
	leases, err := s.List()
	if diff := cmp.Diff([]ipam.Lease{{Owner: owner(1), Addresses: addresses("10.0.0.2")}}, leases, equal); diff != "" || err != nil {
		t.Errorf("leases (-want +got):\n%s%v", diff, err)
	}
}

// An address whose holder nobody can tell stays taken while the kernel leads to it, and then cools down.
func TestAddressWithoutHolder(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	passed := at(s, 0)
	one := prefixes("10.0.0.0/30")
	allocate(t, s, one, owner(1))
	write(t, dir, "c1@eth0", "garbage")
	if err := os.Remove(filepath.Join(dir, "c1@eth0")); err != nil {
		t.Fatal(err)
	}
	refused := func(when string) {
		t.Helper()
		if as, err := s.Allocate(one, owner(2)); !errors.As(err, new(*ipam.ExhaustedError)) {
			t.Fatalf("%s: leased %v, %v", when, as, err)
		}
	}
	unknown := func(netip.Addr) (bool, error) { return false, unix.EIO }
	if _, err := s.Repair(unknown); err == nil || len(setAside(t, s)) > 0 {
		t.Errorf("moved %v, %v, without knowing what stands", setAside(t, s), err)
	}
	if moved := repair(t, s, everywhere); len(moved) > 0 {
		t.Errorf("moved %v, which stands", moved)
	}
	if owners, err := s.Owners(); err != nil || len(owners) > 0 {
		t.Errorf("owners %v, %v", owners, err)
	}
	passed(coolDown)
	forget(t, s)
	refused("while a route stands")
	if diff := cmp.Diff([]string{"10.0.0.2"}, repair(t, s, nowhere)); diff != "" {
		t.Errorf("moved (-want +got):\n%s", diff)
	}
	refused("while it cools down")
	passed(coolDown)
	forget(t, s)
	allocate(t, s, one, owner(2))
}

// An attachment's file that was replaced is not its lease any more, but what it held is found by what the addresses' files say.
func TestReplacedFile(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	held := allocate(t, s, prefixes("10.0.0.0/24"), owner(1))
	if err := os.Remove(filepath.Join(dir, "c1@eth0")); err != nil {
		t.Fatal(err)
	}
	write(t, dir, "c1@eth0", "garbage")
	if moved := repair(t, s, nowhere); len(moved) > 0 {
		t.Errorf("moved %v", moved)
	}
	if diff := cmp.Diff(held, release(t, s, owner(1)), equal); diff != "" {
		t.Errorf("released (-want +got):\n%s", diff)
	}
}

// An address whose file is gone is leased to nobody else while its attachment's lease names it, and cools down with that.
func TestLostNameFreesNothing(t *testing.T) {
	ranges := prefixes("10.0.0.8/29", "fd00::/64")
	for name, tt := range map[string]struct {
		remembered, repaired bool
	}{"nothing remembered": {}, "repaired": {repaired: true}, "until the range is exhausted": {remembered: true}} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir)
			passed := at(s, 0)
			held := allocate(t, s, ranges, owner(1))
			for _, a := range held {
				if err := os.Remove(filepath.Join(dir, a.String())); err != nil {
					t.Fatal(err)
				}
			}
			if tt.repaired {
				restored, err := s.Repair(nowhere)
				if diff := cmp.Diff(held, restored, equal); diff != "" || err != nil {
					t.Errorf("restored (-want +got):\n%s, %v", diff, err)
				}
				if moved := setAside(t, s); len(moved) > 0 {
					t.Errorf("moved %v", moved)
				}
			}
			if !tt.remembered {
				if err := os.Truncate(filepath.Join(dir, ".lock"), 0); err != nil {
					t.Fatal(err)
				}
			}
			for i := range 4 { // as many as there are beside it
				for _, a := range allocate(t, s, ranges, owner(2+i)) {
					if slices.Contains(held, a) {
						t.Errorf("%s was leased twice", a)
					}
				}
			}
			// Marks that lie have the names looked at.
			lie(t, dir)
			if err := s.Room(ranges[:1]); !errors.As(err, new(*ipam.ExhaustedError)) {
				t.Errorf("room in the exhausted range, %v", err)
			}
			if as, err := s.Allocate(ranges, owner(9)); !errors.As(err, new(*ipam.ExhaustedError)) {
				t.Errorf("leased %v from the exhausted range, %v", as, err)
			}
			if diff := cmp.Diff(held, release(t, s, owner(1)), equal); diff != "" {
				t.Errorf("released (-want +got):\n%s", diff)
			}
			if as, err := s.Allocate(ranges, owner(9)); !errors.As(err, new(*ipam.ExhaustedError)) {
				t.Errorf("leased %v while it cools down, %v", as, err)
			}
			passed(coolDown)
			forget(t, s)
			allocate(t, s, ranges, owner(9))
		})
	}
}

// lie has the store remember that all IPv4 addresses are leased.
func lie(t *testing.T, dir string) {
	t.Helper()
	file, err := os.OpenFile(filepath.Join(dir, ".lock"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = file.WriteAt([]byte(strings.Repeat("\xff", 8<<10)), 4096)
	if err = errors.Join(err, file.Close()); err != nil {
		t.Fatal(err)
	}
}

// What was lost of a lease's names cools down with it, though nobody repaired it.
func TestLostNameCoolsDown(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	passed := at(s, 0)
	one := prefixes("10.0.0.0/30")
	held := allocate(t, s, one, owner(1))
	if err := os.Remove(filepath.Join(dir, held[0].String())); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(held, release(t, s, owner(1)), equal); diff != "" {
		t.Errorf("released (-want +got):\n%s", diff)
	}
	if as, err := s.Allocate(one, owner(2)); !errors.As(err, new(*ipam.ExhaustedError)) {
		t.Errorf("leased %v while it cools down, %v", as, err)
	}
	passed(coolDown)
	forget(t, s)
	allocate(t, s, one, owner(2))
}

// An ADD that is under way, and what a killed one leaves, is not repaired: who holds it can be told.
func TestRepairLeavesWhatIsHeld(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir)
	allocate(t, s, prefixes("10.0.0.0/24"), owner(1))
	if err := os.Remove(filepath.Join(dir, "c1@eth0")); err != nil {
		t.Fatal(err)
	}
	if moved := repair(t, s, nowhere); len(moved) > 0 {
		t.Errorf("moved %v", moved)
	}
	if owners, err := s.Owners(); err != nil || !slices.Equal(owners, []ipam.Owner{owner(1)}) {
		t.Errorf("owners %v, %v", owners, err)
	}
}
