// Package manifests_test checks that the rendered manifest is current. What a real API server makes of the manifests is tested
// beside the code that uses it, in pkg/kube.
package manifests_test

import (
	"bytes"
	"flag"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write warren.yaml instead of comparing it")

const header = "# Rendered from manifests/kustomization.yaml by `make manifests`. Do not edit.\n"

func TestRendered(t *testing.T) {
	kubectl, err := filepath.Abs("../build/tools/kubectl")
	if err != nil {
		t.Fatal(err)
	}
	text, err := exec.CommandContext(t.Context(), kubectl, "kustomize", ".").CombinedOutput()
	if err != nil {
		t.Fatalf("rendering (scripts/tools/build.sh kubectl builds the program): %v\n%s", err, text)
	}
	rendered := header + string(text)
	if *update {
		if err = os.WriteFile("warren.yaml", []byte(rendered), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	committed, err := os.ReadFile("warren.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(rendered, string(committed)); diff != "" {
		t.Errorf("warren.yaml is not current; run `make manifests` (-rendered +committed):\n%s", diff)
	}
}

// TestOneImage checks that daemon, tunnel and cleanup come from one image.
func TestOneImage(t *testing.T) {
	var images []string
	for _, file := range []string{"warren.yaml", "userspace-tunnel.yaml", "cleanup.yaml"} {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(text) {
			if image, ok := strings.CutPrefix(strings.TrimSpace(string(line)), "image: "); ok {
				images = append(images, image)
			}
		}
	}
	if len(images) != 5 || len(slices.Compact(slices.Clone(images))) != 1 {
		t.Errorf("the images are %v, want the same in the five containers", images)
	}
}
