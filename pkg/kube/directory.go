package kube

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"github.com/go-logr/logr"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/klog/v2"

	"github.com/warren-cni/warren/pkg/cluster"
)

// settleTime is how long the directory has to be quiet before it is read: programs that write a file in several steps are
// not read in the middle.
const settleTime = 50 * time.Millisecond

// settleLimit is how long it may take to become quiet: a program that writes there all the time must not keep a new policy
// from being seen.
const settleLimit = 2 * time.Second

// maxFile bounds a file, in bytes.
const maxFile = 16 << 20

// Directory follows the objects in the *.yaml, *.yml and *.json files of a directory, not of the directories below.
//
// A file that becomes unreadable, or empty, keeps the objects that it had until it is corrected or deleted. A file that is
// unreadable from the start gives the objects that can be read, and a policy in it that is recognisable but broken
// isolates its namespace.
type Directory struct {
	signals
	path    string
	self    string
	log     *slog.Logger
	decoder decoder
	events  events

	mu       sync.Mutex
	files    map[string]*file
	store    store
	problems []cluster.Problem
	// services and endpoints answer questions; their changes are nobody's.
	services  map[cluster.Key]*corev1.Service
	endpoints map[cluster.Key]*discoveryv1.EndpointSlice
}

// file is what is known of one file.
type file struct {
	data []byte
	content
	// complete is true once the file was readable as a whole.
	complete bool
}

// NewDirectory returns the source of the node called self. Nothing is read before Run.
func NewDirectory(path, self string, log *slog.Logger) (*Directory, error) {
	decoder, err := newDecoder()
	if err != nil {
		return nil, err
	}
	return &Directory{
		signals: newSignals(), path: path, self: self, log: log, decoder: decoder,
		files: make(map[string]*file), store: newStore(),
	}, nil
}

// Load reads a directory once, as the node called self sees it.
func Load(path, self string) (cluster.Snapshot, []cluster.Problem, error) {
	d, err := ReadDirectory(path, self)
	if err != nil {
		return cluster.Snapshot{}, nil, err
	}
	snapshot, problems := d.Snapshot()
	return snapshot, problems, nil
}

// ReadDirectory returns the source of a directory that is read once and not followed, to ask it questions.
func ReadDirectory(path, self string) (*Directory, error) {
	d, err := NewDirectory(path, self, slog.New(slog.DiscardHandler))
	if err != nil {
		return nil, err
	}
	if err := d.load(); err != nil {
		return nil, err
	}
	return d, nil
}

// Run reads the directory and follows its changes until the context ends.
func (d *Directory) Run(ctx context.Context) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("following directory %s: %w", d.path, err)
	}
	if err := watcher.Add(d.path); err != nil {
		return errors.Join(fmt.Errorf("following directory %s: %w", d.path, err), watcher.Close())
	}
	if err := d.load(); err != nil {
		return errors.Join(err, watcher.Close())
	}
	d.events.run(klog.NewContext(ctx, logr.FromSlogHandler(d.log.Handler())), d.self, logSink{d.log})
	close(d.synced)
	return errors.Join(d.watch(ctx, watcher), watcher.Close())
}

func (d *Directory) watch(ctx context.Context, watcher *fsnotify.Watcher) error {
	var settled, latest <-chan time.Time
	changed := func() {
		settled = time.After(settleTime)
		if latest == nil {
			latest = time.After(settleLimit)
		}
	}
	for {
		var due bool
		select {
		case <-ctx.Done():
			return nil
		case event := <-watcher.Events:
			if event.Has(fsnotify.Remove) && event.Name == filepath.Clean(d.path) {
				return fmt.Errorf("following directory %s: it was deleted", d.path)
			}
			changed()
		case err := <-watcher.Errors:
			d.log.Warn("reading the whole directory, since events were lost", "directory", d.path, "error", err)
			changed()
		case <-settled:
			due = true
		case <-latest:
			due = true
		}
		if due {
			settled, latest = nil, nil
			if err := d.load(); err != nil {
				return err
			}
		}
	}
}

// Changes returns what changed since the last call; the first one returns everything.
func (d *Directory) Changes() cluster.Delta {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.store.changes()
}

// Problems returns what could not be understood or read.
func (d *Directory) Problems() []cluster.Problem {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.problems)
}

// Snapshot returns the objects of all files and what could not be understood in them.
func (d *Directory) Snapshot() (cluster.Snapshot, []cluster.Problem) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.store.snapshot(d.self), slices.Clone(d.problems)
}

// Refresh reads the directory again: its changes may not have been seen yet. A pod that is not there with that uid is an error.
func (d *Directory) Refresh(_ context.Context, namespace, name, uid string) error {
	if err := d.load(); err != nil {
		return err
	}
	if !d.knows(namespace, name, uid) {
		return fmt.Errorf("looking for pod %s/%s with uid %q in %s: %w", namespace, name, uid, d.path, errPodUnknown)
	}
	return nil
}

func (d *Directory) knows(namespace, name, uid string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	pod, ok := d.store.pods.objects[cluster.Key{Namespace: namespace, Name: name}]
	return ok && isPod(pod, uid)
}

// load reads every file that is new or changed, and makes the snapshot of all.
func (d *Directory) load() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return fmt.Errorf("reading directory %s: %w", d.path, err)
	}
	files := make(map[string]*file, len(entries))
	for _, entry := range entries {
		if name := entry.Name(); isObjectFile(entry) {
			if f := d.read(name, d.files[name]); f != nil {
				files[name] = f
			}
		}
	}
	if !maps.Equal(files, d.files) { // a file that is as it was is the same one
		d.files = files
		d.assemble()
	}
	return nil
}

// isObjectFile leaves out hidden files: editors and Publish write there first.
func isObjectFile(entry fs.DirEntry) bool {
	name := entry.Name()
	return !entry.IsDir() && !strings.HasPrefix(name, ".") &&
		slices.Contains([]string{".yaml", ".yml", ".json"}, filepath.Ext(name))
}

// read returns the file's new state, which is the old one as long as it cannot be read; nil where there is no file.
func (d *Directory) read(name string, before *file) *file {
	data, err := readRegular(os.DirFS(d.path), name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	now := &file{data: data}
	switch {
	case err != nil:
		now.fail(name, "", err)
	case before != nil && bytes.Equal(before.data, data):
		return before
	case before != nil && len(before.objects) > 0 && len(bytes.TrimSpace(data)) == 0:
		now.fail(name, "", errors.New("the file is empty; delete it if its objects shall go"))
	default:
		now.content = d.decoder.file(name, data)
	}
	now.complete = len(now.problems) == 0
	if now.complete || before == nil || !before.complete {
		return now
	}
	for i := range now.problems {
		now.problems[i].Message += ": the objects of the file stay as they were"
	}
	now.objects, now.broken, now.complete = before.objects, nil, true
	return now
}

// readRegular reads a file, or the file that a link names, and nothing that never ends.
func readRegular(dir fs.FS, name string) ([]byte, error) {
	info, err := fs.Stat(dir, name)
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, errors.New("it is no regular file")
	case info.Size() > maxFile:
		return nil, fmt.Errorf("it has %d bytes, and at most %d are read", info.Size(), maxFile)
	}
	return fs.ReadFile(dir, name)
}

// assemble takes over the objects of all files. The first of two objects with one name counts, in the order of file names.
func (d *Directory) assemble() {
	collected := newCollection()
	for _, name := range slices.Sorted(maps.Keys(d.files)) {
		f := d.files[name]
		collected.problems = append(collected.problems, f.problems...)
		for _, o := range f.objects {
			collected.add(name, o)
		}
		for _, p := range f.broken {
			collected.add(name, p)
		}
	}
	d.services, d.endpoints = collected.services, collected.endpoints
	problems := cluster.SortProblems(collected.problems)
	if d.store.become(&collected.store) || !slices.Equal(problems, d.problems) {
		d.problems = problems
		d.log.Debug("objects changed", "directory", d.path, "files", len(d.files), "problems", len(problems))
		d.notify()
	}
}
