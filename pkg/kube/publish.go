package kube

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	utilyaml "k8s.io/apimachinery/pkg/util/yaml"
	"sigs.k8s.io/yaml"
)

// Publish writes the annotations into the file that holds the own Node; an empty value removes one. The other documents of the file stay as they are,
// byte by byte; comments inside the Node's own document are lost.
func (d *Directory) Publish(_ context.Context, annotations map[string]string) error {
	if _, node := d.ownNode(); node != nil && carries(node.Annotations, annotations) {
		return nil
	}
	unlock, err := lockDirectory(d.path)
	if err != nil {
		return err
	}
	err = d.publish(annotations)
	if err = errors.Join(err, unlock()); err != nil {
		return fmt.Errorf("writing the annotations of node %s: %w", d.self, err)
	}
	return d.load()
}

func (d *Directory) publish(annotations map[string]string) error {
	name, node := d.ownNode()
	if node == nil {
		return fmt.Errorf("no file in %s holds the node", d.path)
	}
	path := filepath.Join(d.path, name)
	data, err := fs.ReadFile(os.DirFS(d.path), name)
	if err != nil {
		return err
	}
	edited, changed, err := annotateNode(data, d.self, annotations)
	if err != nil {
		return fmt.Errorf("editing %s: %w", path, err)
	}
	if !changed {
		return nil
	}
	if filepath.Ext(name) == ".json" {
		if edited, err = yaml.YAMLToJSON(edited); err != nil {
			return fmt.Errorf("editing %s: %w", path, err)
		}
	}
	return replaceFile(path, edited)
}

// ownNode returns the own Node and the name of the file that holds it, or nil.
func (d *Directory) ownNode() (string, *corev1.Node) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(d.files)) {
		for _, o := range d.files[name].objects {
			if node, ok := o.(*corev1.Node); ok && node.Name == d.self {
				return name, node
			}
		}
	}
	return "", nil
}

// lockDirectory keeps the daemons of other nodes out, which may edit the same file.
func lockDirectory(path string) (unlock func() error, err error) {
	dir, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("locking directory %s: %w", path, err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("locking directory %s: %w", path, err), dir.Close())
	}
	return dir.Close, nil
}

// annotateNode sets and removes the annotations of that Node in a file's documents, and reports whether anything changed.
func annotateNode(data []byte, name string, annotations map[string]string) ([]byte, bool, error) {
	var out bytes.Buffer
	changed := false
	documents := utilyaml.NewYAMLReader(bufio.NewReader(bytes.NewReader(data)))
	for first := true; ; first = false {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return out.Bytes(), changed, nil
		}
		if err != nil {
			return nil, false, err
		}
		var object map[string]any
		// Numbers stay as they are written: as float64 large ones would change.
		err = yaml.Unmarshal(document, &object, func(j *json.Decoder) *json.Decoder { j.UseNumber(); return j })
		if err == nil && annotate(object, name, annotations) {
			changed = true
			if document, err = yaml.Marshal(object); err != nil {
				return nil, false, err
			}
		}
		if !first {
			out.WriteString("---\n")
		}
		out.Write(document)
	}
}

// annotate edits an object that is that Node, or a List with it, and reports whether it changed.
func annotate(object map[string]any, name string, annotations map[string]string) bool {
	changed := false
	if items, ok := object["items"].([]any); ok && object["kind"] == "List" {
		for _, item := range items {
			if inner, isObject := item.(map[string]any); isObject && annotate(inner, name, annotations) {
				changed = true
			}
		}
		return changed
	}
	metadata, ok := object["metadata"].(map[string]any)
	if !ok || object["kind"] != "Node" || metadata["name"] != name {
		return false
	}
	have, ok := metadata["annotations"].(map[string]any)
	if !ok {
		have = make(map[string]any, len(annotations))
		metadata["annotations"] = have
	}
	for key, value := range annotations {
		switch _, present := have[key]; {
		case value == "" && present:
			delete(have, key)
			changed = true
		case value != "" && have[key] != value:
			have[key] = value
			changed = true
		}
	}
	return changed
}

// replaceFile puts new content in a file's place at once: readers see the old content or the new.
func replaceFile(path string, data []byte) error {
	info, err := os.Stat(path)
	if err != nil {
		return err
	}
	temporary, err := os.CreateTemp(filepath.Dir(path), ".warren-*")
	if err != nil {
		return err
	}
	if err = fill(temporary, data, info.Mode().Perm()); err == nil {
		err = os.Rename(temporary.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(temporary.Name()))
	}
	return nil
}

// fill writes, syncs and closes a file.
func fill(f *os.File, data []byte, mode os.FileMode) error {
	_, err := f.Write(data)
	return errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
}
