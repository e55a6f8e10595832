package kube

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/cluster"
)

const (
	nodeYAML = `apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.1.0.0/24]}
`
	podYAML = `apiVersion: v1
kind: Pod
metadata: {name: api-1, namespace: shop, uid: u1, labels: {app: api}}
spec: {nodeName: n1, containers: [{name: c, image: i}]}
`
	policyYAML = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny, namespace: shop}
spec: {podSelector: {matchLabels: {app: api}}}
`
)

func write(t *testing.T, dir, name, text string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// directory is a Directory of files, read but not followed.
type directory struct {
	*Directory
	t   *testing.T
	dir string
}

func newDirectory(t *testing.T, files map[string]string) directory {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		write(t, dir, name, text)
	}
	d, err := NewDirectory(dir, "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.load(); err != nil {
		t.Fatal(err)
	}
	return directory{Directory: d, t: t, dir: dir}
}

// update writes a file and reads the directory again.
func (d directory) update(name, text string) {
	d.t.Helper()
	write(d.t, d.dir, name, text)
	if err := d.load(); err != nil {
		d.t.Fatal(err)
	}
}

// summary lists the snapshot's objects.
func summary(s cluster.Snapshot) []string {
	var names []string
	for _, n := range s.Nodes {
		names = append(names, "node "+n.Name)
	}
	for _, n := range s.Namespaces {
		names = append(names, "namespace "+n.Name)
	}
	for _, p := range s.Pods {
		names = append(names, "pod "+p.Namespace+"/"+p.Name)
	}
	for _, p := range s.Policies {
		names = append(names, "policy "+p.Namespace+"/"+p.Name+" "+p.Pods.String())
	}
	return names
}

func TestLoadReadsAllForms(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "a.yaml", "# a comment\n---\n"+nodeYAML+"---\n\n---\n# only a comment\n---\n"+podYAML)
	write(t, dir, "b.yml", `{apiVersion: v1, kind: List, items: [{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {team: a}}}, {apiVersion: v1, kind: Pod, metadata: {name: lonely}}]}`)
	write(t, dir, "c.json", `{"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "deny", "namespace": "shop"}, "spec": {"podSelector": {}}}`)
	write(t, dir, ".hidden.yaml", "broken: [")
	write(t, dir, "notes.txt", "broken: [")
	write(t, dir, "old.yaml~", "broken: [")
	snapshot, problems, err := Load(dir, "n1")
	if err != nil {
		t.Fatal(err)
	}
	checkEqual(t, "objects", []string{"node n1", "namespace shop", "pod default/lonely", "pod shop/api-1", "policy shop/deny "}, summary(snapshot))
	checkEqual(t, "problems", []string{}, fieldsOf(problems))
	if snapshot.Self != "n1" {
		t.Errorf("the snapshot is that of %q, want n1", snapshot.Self)
	}
}

func TestLoadReportsWhatIsNotKubernetes(t *testing.T) {
	for name, test := range map[string]struct {
		text    string
		field   string
		message string
		// policies that stand in for what was broken
		policies []string
	}{
		"indentation lost": {
			text:     "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata:\nname: deny\nnamespace: shop\nspec:\npodSelector: {}\n",
			field:    "name",
			message:  "unknown field",
			policies: []string{"policy shop/deny "},
		},
		"unknown field in a rule": {
			text:     strings.Replace(policyYAML, "spec: {", "spec: {ingress: [{form: []}], ", 1),
			field:    "spec.ingress[0].form",
			message:  "unknown field",
			policies: []string{"policy shop/deny "},
		},
		"field twice": {
			text:    policyYAML + "kind: NetworkPolicy\n",
			message: `key "kind" already set`,
		},
		"wrong type": {
			text:     strings.Replace(policyYAML, "{matchLabels: {app: api}}", "api", 1),
			message:  "podSelector",
			policies: []string{"policy shop/deny "},
		},
		"kind not used":    {text: "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: x}\n", field: "kind", message: "ConfigMap objects are not read here"},
		"kind not known":   {text: strings.Replace(policyYAML, "NetworkPolicy", "Networkpolicy", 1), message: `objects of kind "Networkpolicy" in version "networking.k8s.io/v1" are not read here`},
		"version unknown":  {text: strings.Replace(policyYAML, "networking.k8s.io/v1", "extensions/v1beta1", 1), message: "extensions/v1beta1", policies: []string{"policy shop/deny "}},
		"no kind":          {text: "metadata: {name: x}\n", message: "'Kind' is missing"},
		"no name":          {text: strings.Replace(policyYAML, "name: deny, ", "", 1), message: "metadata.name is missing", policies: []string{"policy shop/unnamed "}},
		"not a mapping":    {text: "just words\n", message: "cannot unmarshal"},
		"not YAML":         {text: "{[\n", message: "yaml"},
		"tabs":             {text: "apiVersion: v1\nkind:\tPod\nmetadata:\n\tname: x\n", message: "cannot start any token"},
		"bad item of list": {text: "apiVersion: v1\nkind: List\nitems: [{apiVersion: v1, kind: Pod, metadata: {nam: x}}]\n", field: "metadata.nam", message: "unknown field"},
	} {
		t.Run(name, func(t *testing.T) {
			// The good documents beside it are not affected.
			d := newDirectory(t, map[string]string{"good.yaml": nodeYAML, "mixed.yaml": test.text + "---\n" + podYAML})
			snapshot, problems := d.Snapshot()
			checkEqual(t, "objects", append([]string{"node n1", "pod shop/api-1"}, test.policies...), summary(snapshot))
			if len(problems) == 0 {
				t.Fatal("no problem was reported")
			}
			p := problems[0]
			if p.Code != "FileInvalid" || !strings.HasPrefix(p.Object, "mixed.yaml document 1") || p.Field != test.field || !strings.Contains(p.Message, test.message) {
				t.Errorf("problem %+v: want FileInvalid for mixed.yaml document 1, field %q, message with %q", p, test.field, test.message)
			}
			for _, policy := range snapshot.Policies {
				if !policy.Ingress || !policy.Egress || len(policy.IngressRules)+len(policy.EgressRules) > 0 {
					t.Errorf("the policy in place of the broken one is %+v: want both directions isolated and no rule", policy)
				}
			}
		})
	}
}

func TestDirectoryKeepsTheLastGoodState(t *testing.T) {
	good := policyYAML + "---\n" + podYAML
	for name, broken := range map[string]string{
		"not YAML":               "{[",
		"empty":                  "",
		"half written":           good[:len(good)-40],
		"policy with a bad rule": strings.Replace(good, "spec: {", "spec: {ingres: [], ", 1),
	} {
		t.Run(name, func(t *testing.T) {
			d := newDirectory(t, map[string]string{"shop.yaml": good, "n1.yaml": nodeYAML})
			before, _ := d.Snapshot()
			<-d.Changed()
			for range 2 {
				d.update("shop.yaml", broken)
				after, problems := d.Snapshot()
				checkEqual(t, "snapshot", before, after)
				if len(problems) == 0 || !strings.HasPrefix(problems[0].Object, "shop.yaml") {
					t.Errorf("problems %v: want one that names shop.yaml", problems)
				}
			}
			<-d.Changed()
			d.update("shop.yaml", podYAML)
			after, problems := d.Snapshot()
			checkEqual(t, "objects after the correction", []string{"node n1", "pod shop/api-1"}, summary(after))
			checkEqual(t, "problems after the correction", []string{}, fieldsOf(problems))
		})
	}
}

func TestDirectoryForgetsDeletedFiles(t *testing.T) {
	d := newDirectory(t, map[string]string{"shop.yaml": policyYAML, "n1.yaml": nodeYAML})
	if err := os.Remove(filepath.Join(d.dir, "shop.yaml")); err != nil {
		t.Fatal(err)
	}
	if err := d.load(); err != nil {
		t.Fatal(err)
	}
	snapshot, _ := d.Snapshot()
	checkEqual(t, "objects", []string{"node n1"}, summary(snapshot))
}

func TestDirectoryReportsDuplicates(t *testing.T) {
	other := strings.Replace(policyYAML, "app: api", "app: web", 1)
	d := newDirectory(t, map[string]string{"b.yaml": other, "a.yaml": policyYAML})
	snapshot, problems := d.Snapshot()
	checkEqual(t, "objects", []string{"policy shop/deny app=api"}, summary(snapshot))
	if len(problems) != 1 || problems[0].Code != "ObjectDuplicate" || !strings.Contains(problems[0].Message, "a.yaml") || !strings.Contains(problems[0].Message, "b.yaml") {
		t.Errorf("problems %v: want one ObjectDuplicate that names both files", problems)
	}
}

func TestDirectoryReportsObjectsThatCannotBeConverted(t *testing.T) {
	d := newDirectory(t, map[string]string{"a.yaml": strings.Replace(nodeYAML, "10.1.0.0/24", "10.1.0/24", 1)})
	_, problems := d.Snapshot()
	checkEqual(t, "fields", []string{"spec.podCIDRs[0]"}, fieldsOf(problems))
}

func TestDirectorySaysNothingWhenNothingChanged(t *testing.T) {
	d := newDirectory(t, map[string]string{"n1.yaml": nodeYAML})
	<-d.Changed()
	d.update("n1.yaml", "# a comment\n"+nodeYAML)
	select {
	case <-d.Changed():
		t.Error("a change was signalled though the snapshot is the same")
	default:
	}
}

func TestDirectoryRefresh(t *testing.T) {
	d := newDirectory(t, map[string]string{"n1.yaml": nodeYAML})
	if err := d.Refresh(t.Context(), "shop", "api-1", "u1"); !errors.Is(err, errPodUnknown) {
		t.Errorf("refreshing a pod that is nowhere: got %v, want errPodUnknown", err)
	}
	write(t, d.dir, "pod.yaml", podYAML)
	if err := d.Refresh(t.Context(), "shop", "api-1", "u1"); err != nil {
		t.Errorf("refreshing a pod whose file is new: %v", err)
	}
	if err := d.Refresh(t.Context(), "shop", "api-1", "u2"); !errors.Is(err, errPodUnknown) {
		t.Errorf("refreshing a pod with another uid: got %v, want errPodUnknown", err)
	}
}

func TestDirectoryRun(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "n1.yaml", nodeYAML)
	d, err := NewDirectory(dir, "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	if err := d.WaitForSync(ctx); err != nil {
		t.Fatal(err)
	}
	expect := func(what string, want ...string) {
		t.Helper()
		for {
			snapshot, _ := d.Snapshot()
			if got := summary(snapshot); len(got) == len(want) && strings.Join(got, ",") == strings.Join(want, ",") {
				return
			}
			select {
			case <-d.Changed():
			case <-ctx.Done():
				t.Fatalf("%s: got %v, want %v", what, summary(snapshot), want)
			}
		}
	}
	expect("at the start", "node n1")
	write(t, dir, "shop.yaml", policyYAML)
	expect("after a file was written", "node n1", "policy shop/deny app=api")
	stop := writeAllTheTime(t, filepath.Join(dir, ".noise"))
	write(t, dir, "noisy.yaml", podYAML)
	expect("while another file is written all the time", "node n1", "pod shop/api-1", "policy shop/deny app=api")
	stop()
	if err := os.Remove(filepath.Join(dir, "noisy.yaml")); err != nil {
		t.Fatal(err)
	}
	expect("after the noise", "node n1", "policy shop/deny app=api")
	write(t, dir, ".new", strings.Replace(policyYAML, "app: api", "app: web", 1))
	if err := os.Rename(filepath.Join(dir, ".new"), filepath.Join(dir, "shop.yaml")); err != nil {
		t.Fatal(err)
	}
	expect("after a file was replaced", "node n1", "policy shop/deny app=web")
	if err := os.Remove(filepath.Join(dir, "shop.yaml")); err != nil {
		t.Fatal(err)
	}
	expect("after a file was deleted", "node n1")
	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Run ended with %v, want nil", err)
	}
}

// writeAllTheTime writes a file much more often than the directory settles, until stop is called.
func writeAllTheTime(t *testing.T, path string) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var writer sync.WaitGroup
	writer.Go(func() {
		again := time.NewTicker(settleTime / 10)
		defer again.Stop()
		for ctx.Err() == nil {
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				t.Error(err)
				return
			}
			<-again.C
		}
	})
	return func() {
		cancel()
		writer.Wait()
	}
}

// What never ends, or is too large, is reported and does not hold up the other files.
func TestDirectoryReadsOnlyRegularFiles(t *testing.T) {
	d := newDirectory(t, map[string]string{"n1.yaml": nodeYAML})
	if err := unix.Mkfifo(filepath.Join(d.dir, "fifo.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/zero", filepath.Join(d.dir, "zero.yaml")); err != nil {
		t.Fatal(err)
	}
	write(t, d.dir, "large.yaml", "")
	if err := os.Truncate(filepath.Join(d.dir, "large.yaml"), maxFile+1); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("n1.yaml", filepath.Join(d.dir, "link.yml")); err != nil {
		t.Fatal(err)
	}
	d.update("shop.yaml", policyYAML)
	snapshot, problems := d.Snapshot()
	checkEqual(t, "objects", []string{"node n1", "policy shop/deny app=api"}, summary(snapshot))
	var files []string
	for _, p := range problems {
		files = append(files, p.Code+" "+p.Object)
	}
	checkEqual(t, "problems", []string{"FileInvalid fifo.yaml", "FileInvalid large.yaml", "FileInvalid zero.yaml", "ObjectDuplicate nodes/n1"}, files)
}

func TestDirectoryRunNeedsTheDirectory(t *testing.T) {
	dir := t.TempDir()
	gone := filepath.Join(dir, "objects")
	d, err := NewDirectory(gone, "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Run(t.Context()); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), gone) {
		t.Errorf("running without the directory: got %v, want an error that names it", err)
	}
	if err := os.Mkdir(gone, 0o700); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- d.Run(t.Context()) }()
	if err := d.WaitForSync(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(gone); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err == nil {
		t.Error("Run ended without an error after the directory was deleted")
	}
}
