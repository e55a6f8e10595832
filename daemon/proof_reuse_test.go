package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/plugins/pkg/ns"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

const (
	// newsAge is how late the other node hears of everything.
	newsAge = 5 * time.Second
	// snapshotTime is how often the news are taken.
	snapshotTime = 250 * time.Millisecond
	// smallPool is how many pods a node has room for whose podCIDRs are a /26 and a /122.
	smallPool = 61
)

// mirror is a directory of objects that follows another one late, but for one node's object, which goes the other way at
// once because that node's daemon writes it.
type mirror struct {
	from, to string
	own      string
	// age is how many snapshots old the news are that it publishes: from 0, to never.
	age   atomic.Int64
	queue []map[string][]byte
}

// never is an age that news do not reach.
const never = math.MaxInt64

// newMirror copies the directory and follows it until the test ends.
func newMirror(t *testing.T, from, own string) *mirror {
	t.Helper()
	m := &mirror{from: from, to: t.TempDir(), own: own}
	now, err := readAll(m.from)
	if err == nil {
		err = m.publish(now, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	var group sync.WaitGroup
	group.Go(func() {
		ticker := time.NewTicker(snapshotTime)
		defer ticker.Stop()
		for {
			select {
			case <-t.Context().Done():
				return
			case <-ticker.C:
				if err := m.follow(); err != nil && t.Context().Err() == nil {
					t.Error(err)
					return
				}
			}
		}
	})
	t.Cleanup(group.Wait)
	return m
}

// follow takes the news and publishes those that are old enough.
func (m *mirror) follow() error {
	now, err := readAll(m.from)
	if err != nil {
		return err
	}
	if own, err := os.ReadFile(filepath.Join(m.to, m.own)); err != nil {
		return err
	} else if !bytes.Equal(own, now[m.own]) {
		if err = replace(filepath.Join(m.from, m.own), own); err != nil {
			return err
		}
	}
	m.queue = append(m.queue, now)
	for int64(len(m.queue)) > m.age.Load() {
		err = m.publish(m.queue[0], false)
		m.queue = m.queue[1:]
	}
	return err
}

// publish makes the mirror hold what the directory held.
func (m *mirror) publish(files map[string][]byte, own bool) error {
	have, err := readAll(m.to)
	if err != nil {
		return err
	}
	for name, data := range files {
		if (own || name != m.own) && !bytes.Equal(have[name], data) {
			err = errors.Join(err, replace(filepath.Join(m.to, name), data))
		}
		delete(have, name)
	}
	delete(have, m.own)
	for name := range maps.Keys(have) {
		err = errors.Join(err, os.Remove(filepath.Join(m.to, name)))
	}
	return err
}

// readAll reads the objects of a directory.
func readAll(dir string) (map[string][]byte, error) {
	names, err := filepath.Glob(filepath.Join(dir, "*.yaml"))
	files := map[string][]byte{}
	for _, name := range names {
		data, readErr := os.ReadFile(name)
		if errors.Is(readErr, fs.ErrNotExist) {
			continue // removed meanwhile
		}
		err = errors.Join(err, readErr)
		files[filepath.Base(name)] = data
	}
	return files, err
}

// replace writes a file as a whole.
func replace(path string, data []byte) error {
	draft := filepath.Join(filepath.Dir(path), ".draft")
	if err := os.WriteFile(draft, data, 0o600); err != nil {
		return err
	}
	return os.Rename(draft, path)
}

// lateNews makes two nodes: the first has room for few pods, and the second hears of them by a mirror.
func lateNews(t *testing.T, name string) (*stage, *mirror) {
	t.Helper()
	s := newStage(t, name, 2)
	text, err := s.ReadText("node-1")
	if err != nil {
		t.Fatal(err)
	}
	s.writeText("node-1", strings.NewReplacer("10.244.1.0/24", "10.244.1.0/26", "fd00:10:244:1::/64", "fd00:10:244:1::/122").Replace(string(text)))
	s.write("policy", rules{name: "only-friends", selector: app("server"), from: app("friend")}.object())
	m := newMirror(t, s.Objects, "node-2.yaml")
	for i := range s.Nodes {
		s.startTunnel(i)
	}
	s.startDaemon(0, nil)
	s.startDaemonOn(1, m.to, "")
	s.ready(0)
	s.ready(1)
	return s, m
}

// crowd adds as many pods as the first node has room for, eight at a time, trying again while addresses cool down. Each fires
// at the targets from its first instant.
func (s *stage) crowd(label string, f tagged.Fire) (pods []*lab.Pod, guns []*tagged.Gun) {
	s.t.Helper()
	pods, guns = make([]*lab.Pod, smallPool), make([]*tagged.Gun, smallPool)
	var group sync.WaitGroup
	slots := make(chan struct{}, 8)
	for i := range pods {
		group.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			for s.t.Context().Err() == nil {
				pod, err := s.Nodes[0].AddPod(s.t.Context(), lab.Pod{
					Namespace: "shop", Name: fmt.Sprintf("%s-%d", label, i), Labels: app(label),
					Listen: func(netns ns.NetNS) (err error) {
						guns[i], err = tagged.Start(s.t.Context(), netns, f)
						return err
					},
				})
				if err == nil {
					pods[i] = pod
					return
				}
				if refusal, ok := errors.AsType[*types.Error](err); !ok || refusal.Code != types.ErrTryAgainLater {
					s.t.Error(err)
					return
				}
				guns[i].Cease()
				s.pause(time.Second)
			}
		})
	}
	group.Wait()
	if s.t.Failed() {
		s.t.FailNow()
	}
	return pods, guns
}

// deleteAll stops the guns and deletes the pods.
func (s *stage) deleteAll(pods []*lab.Pod, guns []*tagged.Gun) {
	s.t.Helper()
	for i, pod := range pods {
		guns[i].Cease()
		if err := pod.Delete(s.t.Context()); err != nil {
			s.t.Fatal(err)
		}
	}
}

// Addresses pass from pods that a policy lets in to pods that it does not, as fast as they are given out again, while the node of
// the policy's pod hears of everything five seconds late. Nothing of the new holders is accepted, neither as something new nor
// as part of a connection that the old holder had.
func TestProofNoIdentityByStaleAddress(t *testing.T) {
	t.Parallel()
	s, late := lateNews(t, "wpreuse")
	server := s.pod(1, "server")
	echo, err := udpEcho(t.Context(), server.Netns()) // so that connections become established ones
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = echo.Close() })
	late.age.Store(int64(newsAge / snapshotTime))
	counter := s.counter(server.Netns())
	fire := func(tag uint32) tagged.Fire {
		return tagged.Fire{Tag: tag, Targets: server.Addresses, Port: port, Every: 200 * time.Millisecond, Steady: true}
	}

	cycles, want := 0, soak.Trials(1000)
	for cycles < want {
		friends, guns := s.crowd("friend", fire(tagAllowed))
		before := acceptedFrom(counter, friends) // from the friends of earlier rounds
		s.eventually(func() error {
			for address, now := range acceptedFrom(counter, friends) {
				if now == before[address] {
					return fmt.Errorf("nothing arrives from %v", address)
				}
			}
			return nil
		})
		s.deleteAll(friends, guns)
		held := map[netip.Addr]bool{}
		for _, address := range addresses(friends...) {
			held[address] = true
		}

		strangers, guns := s.crowd("stranger", fire(tagForbidden))
		for _, address := range addresses(strangers...) {
			if held[address] { // IPv6 has one address more than the pods need
				cycles++
			}
		}
		s.pause(time.Second)
		s.deleteAll(strangers, guns)
		if arrived := counter.Packets(tagged.Of(tagForbidden)); arrived > 0 {
			t.Fatalf("%d packets of strangers arrived", arrived)
		}
		if err := s.Nodes[0].EndCoolDown(t.Context()); err != nil { // the strangers need none
			t.Fatal(err)
		}
	}
	summary(t, "%d addresses changed hands, news %v late: 0 packets accepted under the old identity", cycles, newsAge)

	// Without the news, and without the cool-down, the same stranger is let in: the count sees it.
	friend := s.reusedBy("friend", fire(tagAllowed))
	s.arrives(counter, 10, tagged.Of(tagAllowed))
	late.age.Store(never)
	if err := friend.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.reusedBy("stranger", fire(tagForbidden))
	s.arrives(counter, 10, tagged.Of(tagForbidden))
}

// reusedBy adds a pod on the first node that fires until the test ends.
func (s *stage) reusedBy(label string, f tagged.Fire) *lab.Pod {
	s.t.Helper()
	s.reuseAddresses(0)
	pod := s.pod(0, label)
	s.t.Cleanup(s.fire(pod, f).Cease)
	return pod
}

// acceptedFrom returns how many packets have arrived from each address of the pods.
func acceptedFrom(counter *tagged.Counter, pods []*lab.Pod) map[netip.Addr]int {
	accepted := map[netip.Addr]int{}
	for _, address := range addresses(pods...) {
		accepted[address] = counter.Packets(func(a tagged.Arrival) bool { return a.Src == address && a.Tag == tagAllowed })
	}
	return accepted
}

// podObject is the object of a pod of the lab.
func podObject(pod *lab.Pod) corev1.Pod {
	object := corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Labels: pod.Labels},
		Spec:       corev1.PodSpec{NodeName: pod.Node.Name, Containers: []corev1.Container{{Name: "main", Image: "none"}}},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning},
	}
	for _, address := range pod.Addresses {
		object.Status.PodIPs = append(object.Status.PodIPs, corev1.PodIP{IP: address.String()})
	}
	return object
}

// A pod that terminates keeps its identity, as a peer and as the pod of a policy, without a gap, for as long as its object is there;
// when that is gone, or says that the pod has succeeded or failed, the pod is nobody.
func TestProofIdentityEndsWithThePod(t *testing.T) {
	t.Parallel()
	s := running(t, "wpterm", 2)
	s.write("policy", rules{name: "isolate-closed", selector: app("closed"), from: app("friend")}.object())
	other, friend, closed := s.pod(1, "other"), s.pod(1, "friend"), s.pod(0, "closed")
	counter := s.counter(closed.Netns())
	fire := func(tag uint32) tagged.Fire {
		return tagged.Fire{Tag: tag, Targets: closed.Addresses, Port: port, Every: 20 * time.Millisecond}
	}
	t.Cleanup(s.fire(other, fire(tagForbidden)).Cease)
	t.Cleanup(s.fire(friend, fire(tagAllowed)).Cease)
	s.eventually(func() error { return inFamilies(counter, tagAllowed) })

	later := 0
	known := func() { // once it is attached, the daemon of the policy's node has read what was written before
		later++
		s.pod(0, fmt.Sprintf("later-%d", later))
	}
	for _, pod := range []*lab.Pod{friend, closed} {
		object := podObject(pod)
		object.DeletionTimestamp, object.DeletionGracePeriodSeconds = &metav1.Time{Time: time.Unix(1e9, 0)}, new(int64(30))
		s.write("pod-shop-"+pod.Name, object)
	}
	known()
	s.arrives(counter, 100, tagged.Of(tagAllowed))
	if gap := counter.Gap(tagged.Of(tagAllowed)); gap > backWithin {
		t.Errorf("a terminating pod was nobody for %v", gap)
	}
	ended := func(what string) {
		known()
		s.pause(closedPatience)
		before := counter.Packets(tagged.Of(tagAllowed))
		s.pause(closedPatience)
		if now := counter.Packets(tagged.Of(tagAllowed)); now > before {
			t.Errorf("%d packets of a pod that has %s arrived", now-before, what)
		}
	}
	for _, phase := range []corev1.PodPhase{corev1.PodSucceeded, corev1.PodFailed} {
		object := podObject(friend)
		object.Status.Phase = phase
		s.write("pod-shop-friend", object)
		ended(string(phase))
		s.write("pod-shop-friend", podObject(friend))
		s.arrives(counter, 10, tagged.Of(tagAllowed))
	}
	if err := s.Remove("pod-shop-friend"); err != nil {
		t.Fatal(err)
	}
	ended("no object")
	if arrived := counter.Packets(tagged.Of(tagForbidden)); arrived > 0 {
		t.Errorf("%d packets of another pod arrived", arrived)
	}
	summary(t, "terminating, succeeded, failed and gone: %d packets beside the policy", counter.Packets(tagged.Of(tagForbidden)))
	s.write("pod-shop-friend", podObject(friend))
	if err := s.Remove("policy"); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error { return inFamilies(counter, tagForbidden) })
}
