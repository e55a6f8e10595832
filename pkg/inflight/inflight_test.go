package inflight_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/inflight"
)

// holdEnv makes the test's own program hold a lock of the directory that it names, until it is killed.
const holdEnv = "INFLIGHT_HOLD"

func TestMain(m *testing.M) {
	dir := os.Getenv(holdEnv)
	if dir == "" {
		os.Exit(m.Run())
	}
	if _, err := inflight.In(dir).Begin(context.Background(), "wrna"); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	_, _ = io.WriteString(os.Stdout, "held\n")
	_, _ = io.Copy(io.Discard, os.Stdin)
}

// begin begins with an attachment, which must not have to wait for longer than a test takes.
func begin(t *testing.T, l inflight.Locks, link string) func() {
	t.Helper()
	end, err := l.Begin(t.Context(), link)
	if err != nil {
		t.Fatal(err)
	}
	return end
}

// free says whether nobody works on an attachment.
func free(t *testing.T, l inflight.Locks, link string) bool {
	t.Helper()
	end, ok, err := l.Try(link)
	if err != nil {
		t.Fatal(err)
	}
	if ok {
		end()
	}
	return ok
}

func TestOneAtATime(t *testing.T) {
	l := inflight.In(t.TempDir())
	end := begin(t, l, "wrna")
	begin(t, l, "wrnb")() // another one does not wait
	if free(t, l, "wrna") {
		t.Error("two work on one attachment")
	}
	if !free(t, l, "wrnb") {
		t.Error("the attachment is not free after its end")
	}
	began := make(chan func())
	go func() {
		next, err := l.Begin(t.Context(), "wrna")
		if err != nil {
			t.Error(err)
		}
		began <- next
	}()
	select {
	case <-began:
		t.Error("the second did not wait for the first")
	case <-time.After(50 * time.Millisecond):
	}
	end()
	(<-began)()
	if !free(t, l, "wrna") {
		t.Error("the attachment is not free after the second's end")
	}
}

func TestBeginGivesUp(t *testing.T) {
	l := inflight.In(t.TempDir())
	defer begin(t, l, "wrna")()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := l.Begin(ctx, "wrna"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want that the time is over", err)
	}
}

func TestPause(t *testing.T) {
	l := inflight.In(t.TempDir())
	var ends []func()
	worked := []string{"wrna", "wrnb", "wrnc", "wrnd", "wrne"}
	for _, link := range worked {
		ends = append(ends, begin(t, l, link))
	}
	began := make(chan func(), 1)
	done, err := l.Pause(t.Context(), func(take func(string) (bool, error)) error {
		go func() {
			next, err := l.Begin(t.Context(), "wrny")
			if err != nil {
				t.Error(err)
			}
			began <- next
		}()
		select {
		case <-began:
			t.Error("somebody began during the pause")
		case <-time.After(50 * time.Millisecond):
		}
		for _, end := range ends[1:] { // who works already goes on
			end()
		}
		for _, link := range worked {
			if is, err := take(link); err != nil || is {
				t.Errorf("it took %s, which was worked on when the pause began: %v, %v", link, is, err)
			}
		}
		if is, err := take("wrny"); err != nil || is {
			t.Errorf("it took what another waits with: %v, %v", is, err)
		}
		for range 2 {
			if is, err := take("wrnz"); err != nil || !is {
				t.Errorf("it did not take what nobody works on: %v, %v", is, err)
			}
		}
		return io.EOF
	})
	if !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want the error of what was done", err)
	}
	(<-began)()
	for link, want := range map[string]bool{"wrna": false, "wrnb": true, "wrny": true, "wrnz": false} {
		if is := free(t, l, link); is != want {
			t.Errorf("%s is free after the pause: %v, want %v", link, is, want)
		}
	}
	done()
	if !free(t, l, "wrnz") {
		t.Error("what was taken is not free after the end")
	}
	ends[0]()
}

// TestPauseOpensOneFile: how much can be taken does not depend on how many files a process may open.
func TestPauseOpensOneFile(t *testing.T) {
	l := inflight.In(t.TempDir())
	open := func() int {
		t.Helper()
		files, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(files)
	}
	before := open()
	done, err := l.Pause(t.Context(), func(take func(string) (bool, error)) error {
		for i := range 1000 {
			if ok, err := take(fmt.Sprintf("wrn%d", i)); !ok || err != nil {
				return fmt.Errorf("taking the %d. attachment: %v, %w", i, ok, err)
			}
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if more := open() - before; more > 2 { // the poller of the runtime may be one
		t.Errorf("it has opened %d files", more)
	}
	if free(t, l, "wrn0") || free(t, l, "wrn999") {
		t.Error("others may work on what was taken")
	}
	done()
	if !free(t, l, "wrn0") || !free(t, l, "wrn999") {
		t.Error("what was taken is not free after the end")
	}
}

// TestDeathEndsTheWork: nothing of a killed process keeps others waiting.
func TestDeathEndsTheWork(t *testing.T) {
	dir := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	holder := exec.Command(self)
	holder.Env = append(os.Environ(), holdEnv+"="+dir)
	holder.Stderr = os.Stderr
	in, err := holder.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = in.Close() }()
	out, err := holder.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err = holder.Start(); err != nil {
		t.Fatal(err)
	}
	if line, readErr := bufio.NewReader(out).ReadString('\n'); readErr != nil {
		t.Fatal(line, readErr)
	}
	l := inflight.In(dir)
	if free(t, l, "wrna") {
		t.Error("the lock of another process does not hold")
	}
	if err = holder.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = holder.Wait() // it was killed
	begin(t, l, "wrna")()
}

func TestWithoutDirectory(t *testing.T) {
	l := inflight.In(t.TempDir() + "/none")
	if _, err := l.Begin(t.Context(), "wrna"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}

// What is no file in the place of the file keeps nobody from working, and is there afterwards; whoever finds it at the same time gets the
// locks of one file.
func TestForeignInTheWay(t *testing.T) {
	for kind, put := range map[string]func(path string) error{
		"directory": func(path string) error { return os.MkdirAll(filepath.Join(path, "x"), 0o700) },
		"link":      func(path string) error { return os.Symlink("/dev/zero", path) },
		"elsewhere": func(path string) error { return os.Symlink("/proc", path) },
		"dangling":  func(path string) error { return os.Symlink("nowhere", path) },
		"socket":    func(path string) error { return unix.Mknod(path, unix.S_IFSOCK|0o600, 0) },
	} {
		t.Run(kind, func(t *testing.T) {
			for range 20 {
				foreignInTheWay(t, put)
			}
		})
	}
}

func foreignInTheWay(t *testing.T, put func(path string) error) {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, inflight.FileName)
	if err := put(path); err != nil {
		t.Fatal(err)
	}
	before, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	var working, most atomic.Int64
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			end, err := inflight.In(dir).Begin(t.Context(), "wrna")
			if err != nil {
				t.Error(err)
				return
			}
			most.Store(max(most.Load(), working.Add(1)))
			runtime.Gosched()
			working.Add(-1)
			end()
		})
	}
	group.Wait()
	if most.Load() != 1 {
		t.Errorf("%d worked on one attachment at a time", most.Load())
	}
	aside, err := inflight.In(dir).Aside()
	if err != nil || len(aside) != 1 {
		t.Fatalf("set aside: %q, %v", aside, err)
	}
	if after, err := os.Lstat(aside[0]); err != nil || !os.SameFile(before, after) {
		t.Errorf("set aside is another: %v", err)
	}
}
