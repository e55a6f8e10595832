package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/lab"
)

// healOwn is how long it may take until a node has mended what somebody did to the annotations of its own Node.
const healOwn = 5 * time.Second

// What a daemon has published on its own Node comes back when somebody changes or deletes it, and the other nodes go on as before. While
// no daemon runs it stays as it was left.
func TestOwnAnnotationsHeal(t *testing.T) {
	t.Parallel()
	s := running(t, "wdheal", 2)
	s.reaches(s.pod(0, "one"), s.pod(1, "two"))
	before := s.published("node-2")
	if len(before) < 4 || before[kube.AnnotationPublicKey] == "" || before[kube.AnnotationKeyProof] == "" {
		t.Fatalf("node-2 publishes %v", before)
	}
	healed := func() error {
		if now := s.published("node-2"); fmt.Sprint(now) != fmt.Sprint(before) {
			return fmt.Errorf("node-2 publishes %v, before it was %v", now, before)
		}
		return nil
	}
	other := s.published("node-1")
	for what, harm := range map[string]func(annotations map[string]string){
		"the key deleted": func(a map[string]string) { delete(a, kube.AnnotationPublicKey) },
		"all deleted":     func(a map[string]string) { clear(a) },
		"another's key":   func(a map[string]string) { a[kube.AnnotationPublicKey] = other[kube.AnnotationPublicKey] },
		"garbage":         func(a map[string]string) { a[kube.AnnotationKeyProof], a[kube.AnnotationMTU] = "garbage", "1" },
		"another port":    func(a map[string]string) { a[kube.AnnotationPort] = "51999" },
		"a next key":      func(a map[string]string) { a[kube.AnnotationNextPublicKey] = other[kube.AnnotationPublicKey] },
	} {
		s.annotate("node-2", harm)
		since := now()
		s.eventually(healed)
		if took := time.Since(since); took > healOwn {
			t.Errorf("%s: it took %v until it was mended", what, took)
		}
	}
	for i := range s.Nodes {
		s.healthy(i)
	}

	s.endDaemon(1, (*lab.Process).Kill)
	s.annotate("node-2", func(a map[string]string) { clear(a) })
	s.knownPeers(0, 0)
	if healed() == nil {
		t.Error("control: it is mended without a daemon")
	}
	s.startDaemon(1, nil)
	s.ready(0)
}

// published returns Warren's annotations of a Node.
func (s *stage) published(name string) map[string]string {
	s.t.Helper()
	ours := map[string]string{}
	for key, value := range s.readNode(name).Annotations {
		if strings.HasPrefix(key, "warren.cni/") {
			ours[key] = value
		}
	}
	return ours
}

// annotate changes a Node's annotations.
func (s *stage) annotate(name string, change func(annotations map[string]string)) {
	s.t.Helper()
	node := s.readNode(name)
	if node.Annotations == nil {
		node.Annotations = map[string]string{}
	}
	change(node.Annotations)
	s.write(name, node)
}

// readNode reads a Node.
func (s *stage) readNode(name string) corev1.Node {
	s.t.Helper()
	var node corev1.Node
	text, err := s.ReadText(name)
	if err == nil {
		err = yaml.Unmarshal(text, &node)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return node
}
