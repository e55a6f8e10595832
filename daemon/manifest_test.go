package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/warren-cni/warren/pkg/preflight"
)

// shipped returns the pod that the rendered manifest makes on every node.
func shipped(t *testing.T) corev1.PodSpec {
	t.Helper()
	text, err := os.ReadFile("../manifests/warren.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for document := range strings.SplitSeq(string(text), "\n---\n") {
		var set appsv1.DaemonSet
		if !strings.Contains(document, "\nkind: DaemonSet\n") {
			continue
		}
		if err = yaml.UnmarshalStrict([]byte(document), &set); err != nil {
			t.Fatal(err)
		}
		return set.Spec.Template.Spec
	}
	t.Fatal("the manifest has no DaemonSet")
	return corev1.PodSpec{}
}

// containerOf returns a container of a pod.
func containerOf(t *testing.T, pod corev1.PodSpec, name string) corev1.Container {
	t.Helper()
	for _, c := range slices.Concat(pod.InitContainers, pod.Containers) {
		if c.Name == name {
			return c
		}
	}
	t.Fatalf("the manifest has no container %s", name)
	return corev1.Container{}
}

// settings are the flags that a container gets by its environment.
func settings(c corev1.Container) []string {
	var set []string
	for _, e := range c.Env {
		if e.ValueFrom == nil {
			set = append(set, e.Name+"="+e.Value)
		}
	}
	return set
}

// confined is the command that runs another one with these capabilities alone and in a PID namespace of its own.
func confined(capabilities []corev1.Capability) []string {
	bounding := "-all"
	for _, c := range capabilities {
		bounding += ",+" + strings.ToLower(string(c))
	}
	return []string{"unshare", "--pid", "--fork", "--mount-proc", "setpriv", "--no-new-privs", "--inh-caps=-all", "--bounding-set=" + bounding}
}

// TestInstallIsSetAsTheDaemon: what the init container looks for depends on what the daemon does. It gets no more capabilities.
func TestInstallIsSetAsTheDaemon(t *testing.T) {
	pod := shipped(t)
	install, daemon := containerOf(t, pod, "install"), containerOf(t, pod, "warrend")
	want := slices.DeleteFunc(settings(daemon), func(s string) bool { return strings.HasPrefix(s, "WARREN_SYSCTL_DIR=") }) // for writing
	if diff := cmp.Diff(want, settings(install)); diff != "" {
		t.Errorf("the settings differ (-daemon +install):\n%s", diff)
	}
	for _, c := range install.SecurityContext.Capabilities.Add {
		if !slices.Contains(daemon.SecurityContext.Capabilities.Add, c) {
			t.Errorf("install has %s, which the daemon has not", c)
		}
	}
}

// installAs runs `warrend install` on the patient in a container as the manifest's: with these capabilities and the settings, and of
// the patient's directories those that the container mounts. It returns the log.
func (p *patient) installAs(install corev1.Container, capabilities []corev1.Capability) string {
	p.t.Helper()
	dirs := map[string]string{
		"/opt/cni/bin": p.options.cniBinDir, "/etc/cni/net.d": p.options.cniConfDir, "/run/warren": p.options.runDir, "/var/lib/warren": p.options.stateDir,
	}
	for _, m := range install.VolumeMounts {
		if dir, ok := dirs[m.MountPath]; ok {
			var flags uintptr
			if m.ReadOnly {
				flags = unix.MS_RDONLY
			}
			p.mount(dir, flags)
		}
	}
	args := append(confined(capabilities),
		warrendIn(p.t), "install", "--source", p.t.TempDir(), "--cni-bin-dir", p.options.cniBinDir, "--cni-conf-dir", p.options.cniConfDir,
		"--run-dir", p.options.runDir, "--state-dir", p.options.stateDir)
	cmd := exec.CommandContext(p.t.Context(), args[0], args[1:]...)
	cmd.Env = append(settings(install), "PATH="+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		p.t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

// TestInstallInContainer installs in the init container of the manifest, on a node with faults: it warns of them, and says in one line
// what it cannot see. Without any of its capabilities it would see less.
func TestInstallInContainer(t *testing.T) {
	install := containerOf(t, shipped(t), "install")
	all := install.SecurityContext.Capabilities.Add
	unseen := map[corev1.Capability][]string{
		"":          {"packet filter", "firewalls", "network managers", "admission policies"}, // firewalls: programs, and no API server here
		"NET_ADMIN": {"iptables backend", "other CNIs"},
		"NET_RAW":   {"iptables backend", "other CNIs"},
	}
	for _, without := range append([]corev1.Capability{""}, all...) {
		t.Run("without "+string(without), func(t *testing.T) {
			p := newPatient(t)
			p.run("iptables-nft -N ufw-user-input")
			p.run("iptables-nft -N cali-FORWARD")
			p.run("iptables-legacy -t nat -N FLANNEL-POSTRTG")
			p.run("ip address add 10.244.7.7/32 dev eth0")
			log := p.installAs(install, slices.DeleteFunc(slices.Clone(all), func(c corev1.Capability) bool { return c == without }))
			warnings := []string{"code=NetworkHoldsNode"}
			if without == "" {
				warnings = append(warnings, "code=UFW", "code=OtherCNIRules", "cali-FORWARD", "FLANNEL-POSTRTG")
			}
			said := ""
			for line := range strings.Lines(log) {
				if strings.Contains(line, "not_checked=") {
					said += line
				}
				if strings.Contains(line, "level=WARN") {
					warnings = slices.DeleteFunc(warnings, func(w string) bool { return strings.Contains(line, w) })
				}
			}
			if len(warnings) > 0 || strings.Count(said, "\n") != 1 || !strings.Contains(said, "level=INFO") {
				t.Errorf("no warning of %q; not checked: %q; the log:\n%s", warnings, said, log)
			}
			var not, want []string
			for _, r := range preflight.Check(preflight.Facts{}, preflight.Wanted{}) {
				if strings.Contains(said, r.Check+": ") {
					not = append(not, r.Check)
				}
				if slices.Contains(unseen[""], r.Check) || slices.Contains(unseen[without], r.Check) {
					want = append(want, r.Check)
				}
			}
			if diff := cmp.Diff(want, not); diff != "" {
				t.Errorf("what is said not to be checked differs (-want +got):\n%s", diff)
			}
		})
	}
}

// mountNamespaces mounts a directory of the node's network namespaces where the collector looks, as the daemon's container has it by
// the manifest under the path that the runtimes give to the plugin.
func (y *yard) mountNamespaces(pod corev1.PodSpec, node string) {
	y.t.Helper()
	mounts := containerOf(y.t, pod, "warrend").VolumeMounts
	i := slices.IndexFunc(mounts, func(m corev1.VolumeMount) bool { return m.MountPath == "/var/run/netns" })
	if i < 0 {
		return
	}
	v := slices.IndexFunc(pod.Volumes, func(v corev1.Volume) bool { return v.Name == mounts[i].Name })
	if source := pod.Volumes[v].HostPath; source.Path != mounts[i].MountPath || *source.Type != corev1.HostPathDirectoryOrCreate {
		y.t.Errorf("%s is %+v on the node", mounts[i].MountPath, source)
	}
	if p := mounts[i].MountPropagation; p != nil {
		y.t.Errorf("the mount of %s is propagated (%s), for which the node's has to be shared", mounts[i].MountPath, *p)
	}
	err := errors.Join(unix.Mount(node, y.dir, "", unix.MS_BIND|unix.MS_REC, ""), unix.Mount("", y.dir, "", unix.MS_PRIVATE|unix.MS_REC, ""))
	if mounts[i].ReadOnly {
		err = errors.Join(err, unix.Mount("", y.dir, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""))
	}
	if err != nil {
		y.t.Fatal(err)
	}
	y.t.Cleanup(func() { _ = unix.Unmount(y.dir, unix.MNT_DETACH) })
}

// TestCollectInContainer: in the daemon's container of the manifest the collector sees namespaces that come after the daemon, and that
// one is gone, whose lease it ends though the pod exists; it cannot write there.
func TestCollectInContainer(t *testing.T) {
	y := newYard(t)
	node := t.TempDir()
	if err := errors.Join(unix.Mount("tmpfs", node, "tmpfs", 0, ""), unix.Mount("", node, "", unix.MS_SHARED, "")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(node, unix.MNT_DETACH) })
	y.mountNamespaces(shipped(t), node)
	y.stands("other")
	for _, name := range []string{"old", "other"} {
		file := filepath.Join(node, name)
		if err := errors.Join(os.WriteFile(file, nil, 0o600), unix.Mount("/proc/thread-self/ns/net", file, "", unix.MS_BIND, "")); err != nil {
			t.Fatal(err)
		}
	}
	if !y.look(long) {
		t.Fatal("the lease was ended while the namespace stands")
	}
	old := filepath.Join(node, "old")
	if err := errors.Join(unix.Unmount(old, unix.MNT_DETACH), os.Remove(old)); err != nil {
		t.Fatal(err)
	}
	if !y.look(goneFor) || y.look(collectEvery) {
		t.Error("the lease was not ended when it was time")
	}
	if err := os.WriteFile(filepath.Join(y.dir, "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("writing among the namespaces: %v", err)
	}
}
