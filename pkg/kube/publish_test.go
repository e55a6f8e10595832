package kube

import (
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"
)

func read(t *testing.T, dir, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func TestPublishKeepsOtherDocuments(t *testing.T) {
	other := "# keep   me\napiVersion: v1\nkind: Node\nmetadata: {name: n2}\n"
	d := newDirectory(t, map[string]string{"nodes.yaml": other + "---\n" + nodeYAML + "---\n" + podYAML})
	want := map[string]string{AnnotationPort: "51820", "warren.cni/other": "x"}
	if err := d.Publish(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	documents := strings.Split(read(t, d.dir, "nodes.yaml"), "---\n")
	if len(documents) != 3 || documents[0] != other || documents[2] != podYAML {
		t.Errorf("the file is now\n%s\nwant the first and the last document untouched", strings.Join(documents, "---\n"))
	}
	var node corev1.Node
	if err := yaml.UnmarshalStrict([]byte(documents[1]), &node); err != nil {
		t.Fatal(err)
	}
	checkEqual(t, "annotations", want, node.Annotations)
	checkEqual(t, "podCIDRs", []string{"10.1.0.0/24"}, node.Spec.PodCIDRs)
	if entries, err := os.ReadDir(d.dir); err != nil || len(entries) != 1 {
		t.Errorf("the directory holds %v (%v), want the one file", entries, err)
	}
}

func TestPublishWritesOnlyDifferences(t *testing.T) {
	d := newDirectory(t, map[string]string{"n1.yaml": nodeYAML})
	annotations := map[string]string{AnnotationPort: "51820"}
	if err := d.Publish(t.Context(), annotations); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(filepath.Join(d.dir, "n1.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err = d.Publish(t.Context(), annotations); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(filepath.Join(d.dir, "n1.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if !os.SameFile(before, after) {
		t.Error("the second Publish wrote the file again")
	}
	if after.Mode().Perm() != 0o600 {
		t.Errorf("the file's mode is %v, want that of before, 0600", after.Mode().Perm())
	}
}

// TestPublishRemoves checks that an empty value removes an annotation, and that one which is not there is no reason to write.
func TestPublishRemoves(t *testing.T) {
	d := newDirectory(t, map[string]string{"n1.yaml": nodeYAML})
	if err := d.Publish(t.Context(), map[string]string{AnnotationPort: "51820", AnnotationNextPublicKey: "x", "warren.cni/other": "y"}); err != nil {
		t.Fatal(err)
	}
	change := map[string]string{AnnotationPort: "51821", AnnotationNextPublicKey: "", AnnotationNextKeyProof: ""}
	if err := d.Publish(t.Context(), change); err != nil {
		t.Fatal(err)
	}
	_, node := d.ownNode()
	checkEqual(t, "annotations", map[string]string{AnnotationPort: "51821", "warren.cni/other": "y"}, node.Annotations)
	before, err := os.Stat(filepath.Join(d.dir, "n1.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	if err = d.Publish(t.Context(), change); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(filepath.Join(d.dir, "n1.yaml")); err != nil || !os.SameFile(before, after) {
		t.Errorf("removing what is not there wrote the file again (%v)", err)
	}
}

func TestPublishInJSONAndLists(t *testing.T) {
	for name, text := range map[string]string{
		"n1.json":   `{"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "generation": 9007199254740993}}`,
		"list.yaml": "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Node, metadata: {name: n1, generation: 9007199254740993}}]\n",
	} {
		d := newDirectory(t, map[string]string{name: text})
		if err := d.Publish(t.Context(), map[string]string{"warren.cni/test": "1"}); err != nil {
			t.Fatal(err)
		}
		got := read(t, d.dir, name)
		if !strings.Contains(got, "warren.cni/test") || !strings.Contains(got, "9007199254740993") {
			t.Errorf("%s is now %s: want the annotation and the same generation", name, got)
		}
		if _, problems := d.Snapshot(); len(problems) > 0 {
			t.Errorf("%s cannot be read any more: %v", name, problems)
		}
	}
}

func TestPublishWithoutTheNode(t *testing.T) {
	d := newDirectory(t, map[string]string{"a.yaml": strings.Replace(nodeYAML, "n1", "n2", 1)})
	if err := d.Publish(t.Context(), map[string]string{AnnotationPort: "1"}); err == nil || !strings.Contains(err.Error(), "n1") {
		t.Errorf("publishing without an own Node: got %v, want an error that names n1", err)
	}
}

// TestPublishTogether checks that daemons whose Nodes stand in one file do not undo each other's work.
func TestPublishTogether(t *testing.T) {
	const nodes = 8
	var file strings.Builder
	for i := range nodes {
		fmt.Fprintf(&file, "---\napiVersion: v1\nkind: Node\nmetadata: {name: n%d}\n", i)
	}
	dir := t.TempDir()
	write(t, dir, "nodes.yaml", file.String())
	var running sync.WaitGroup
	for i := range nodes {
		running.Go(func() {
			d, err := NewDirectory(dir, fmt.Sprintf("n%d", i), slog.New(slog.DiscardHandler))
			if err != nil {
				t.Error(err)
				return
			}
			if err = d.load(); err != nil {
				t.Error(err)
			}
			if err = d.Publish(t.Context(), map[string]string{AnnotationPort: "1"}); err != nil {
				t.Error(err)
			}
		})
	}
	running.Wait()
	if got := strings.Count(read(t, dir, "nodes.yaml"), AnnotationPort); got != nodes {
		t.Errorf("%d of %d nodes are annotated", got, nodes)
	}
}
