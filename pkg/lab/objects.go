package lab

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"sigs.k8s.io/yaml"
)

// Write writes Kubernetes objects to a file of the objects' directory, replacing what it held.
func (l *Lab) Write(name string, objects ...any) error {
	var documents [][]byte
	for _, object := range objects {
		document, err := yaml.Marshal(object)
		if err != nil {
			return fmt.Errorf("encoding objects of %s: %w", name, err)
		}
		documents = append(documents, document)
	}
	return l.WriteText(name, bytes.Join(documents, []byte("---\n")))
}

// WriteText writes text to a file of the objects' directory. The daemons see the old text or the new one, never a part.
func (l *Lab) WriteText(name string, text []byte) error {
	draft := filepath.Join(l.options.Dir, name+".draft")
	if err := os.WriteFile(draft, text, 0o600); err != nil {
		return fmt.Errorf("writing objects: %w", err)
	}
	if err := os.Rename(draft, l.objectFile(name)); err != nil {
		return fmt.Errorf("writing objects: %w", err)
	}
	return nil
}

// ReadText returns the text of a file of the objects' directory.
func (l *Lab) ReadText(name string) ([]byte, error) {
	text, err := os.ReadFile(l.objectFile(name))
	if err != nil {
		return nil, fmt.Errorf("reading objects: %w", err)
	}
	return text, nil
}

// Remove deletes a file of the objects' directory.
func (l *Lab) Remove(name string) error {
	if err := os.Remove(l.objectFile(name)); err != nil {
		return fmt.Errorf("removing objects: %w", err)
	}
	return nil
}

// objectFile is the path of a file of objects.
func (l *Lab) objectFile(name string) string { return filepath.Join(l.Objects, name+".yaml") }
