package podlink_test

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/warren-cni/warren/pkg/podlink"
	"github.com/warren-cni/warren/pkg/testnode"
)

// detach takes pairs out of service.
func detach(t *testing.T, pairs ...podlink.Pair) {
	t.Helper()
	for _, p := range pairs {
		if err := podlink.Detach(p.Host.Name); err != nil {
			t.Fatal(err)
		}
	}
}

// sweep deletes what is out of service.
func sweep(t *testing.T) {
	t.Helper()
	if err := podlink.Sweep(); err != nil {
		t.Fatal(err)
	}
}

// TestDetach: the first call ends all traffic and frees the name, the second finds nothing; Sweep leaves no trace.
func TestDetach(t *testing.T) {
	node, pod := testnode.Enter(t), testnode.New(t)
	run(t, node, "ip addr add 10.244.1.1/32 dev lo; ip addr add fd00::1/128 dev lo")
	routes := func() string {
		return run(t, node, "ip route show table all; ip -6 route show table all; ip neigh; ip -6 neigh")
	}
	beforeNode, beforePod, beforeRoutes := state(t, node), state(t, pod), routes()
	attach(t, pod, pair("2"))
	both := func(in ns.NetNS, hosts ...string) (answers int) {
		t.Helper()
		for _, host := range hosts {
			answers += len(run(t, in, "ping -c 3 -i 0.01 -W 0.3 "+host+" >/dev/null 2>&1 && echo -n y || :"))
		}
		return answers
	}
	try := func() int { return both(pod, "10.244.1.1", "fd00::1") + both(node, "10.244.1.2", "fd00::2") }
	if answers := try(); answers != 4 {
		t.Fatalf("while it is in service %d of 4 answer", answers)
	}
	received := func() string {
		return run(t, node, "ip -s link show type veth | grep -A1 RX: | tail -1") + run(t, pod, "ip -s link show eth0 | grep -A1 RX: | tail -1")
	}
	for range 2 {
		detach(t, pair("2"))
	}
	before := received()
	// A packet by force, and not only what the pod's own routes let out.
	run(t, pod, "ip link set eth0 up; ip route replace default dev eth0; ip -6 route replace default dev eth0")
	if answers := try(); answers != 0 {
		t.Errorf("after it is out of service %d of 4 answer", answers)
	}
	if after := received(); after != before || before == "" {
		t.Errorf("received before\n%sand after\n%s", before, after)
	}
	if links, err := podlink.Links(); err != nil || len(links) > 0 {
		t.Errorf("in service: %v, %v", links, err)
	}
	if after := routes(); after != beforeRoutes {
		t.Errorf("routes before:\n%s\nafter:\n%s", beforeRoutes, after)
	}
	for range 2 {
		sweep(t)
	}
	if after := state(t, node); after != beforeNode {
		t.Errorf("node before:\n%s\nafter:\n%s", beforeNode, after)
	}
	if after := state(t, pod); after != beforePod {
		t.Errorf("pod before:\n%s\nafter:\n%s", beforePod, after)
	}
}

// TestSweepDeletesTrashOnly: what others put beside it stays, whatever it is called and wherever it was put.
func TestSweepDeletesTrashOnly(t *testing.T) {
	tests := map[string]struct{ others, damage string }{
		"alone":                {},
		"names like ours":      {others: "ip link add wrn-bridge type bridge; ip link add other type veth peer name other2"},
		"a foreign one in it":  {others: "ip link add foreign type veth peer name other2; ip link set foreign group 2003987968"},
		"a pod's own in it":    {damage: "ip link set " + pair("9").Host.Name + " group 2003987968"},
		"taken out of it":      {damage: "for l in $(ls /sys/class/net | grep wrn-); do ip link set $l group 0; done"},
		"up again, with route": {damage: "for l in $(ls /sys/class/net | grep wrn-); do ip link set $l up; ip route replace 10.244.1.2 dev $l; done"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			node, kept := testnode.Enter(t), testnode.New(t)
			in := func(command string) { run(t, node, "unshare -m sh -ec 'mount -t sysfs none /sys; "+command+"\n:'") }
			in(tt.others)
			attach(t, kept, pair("9"))
			before := run(t, node, "ip -o link | sed 's/ group [^ ]*//'; ip route")
			for _, n := range []string{"2", "3", "4"} {
				attach(t, testnode.New(t), pair(n))
				detach(t, pair(n))
			}
			if waiting := strings.Count(run(t, node, "ip -o link show group 2003987968"), "wrn-"); waiting != 3 {
				t.Fatalf("%d links wait for deletion, want 3", waiting)
			}
			in(tt.damage)
			sweep(t)
			if after := run(t, node, "ip -o link | sed 's/ group [^ ]*//'; ip route"); after != before {
				t.Errorf("before:\n%s\nafter:\n%s", before, after)
			}
		})
	}
}

func TestRemoveAllLeavesOthersAlone(t *testing.T) {
	node := testnode.Enter(t)
	run(t, node, "ip link add wrn-bridge type bridge; ip link add other type veth peer name other2")
	before := state(t, node)
	for _, n := range []string{"2", "3", "4"} {
		attach(t, testnode.New(t), pair(n))
	}
	detach(t, pair("3"))
	if err := podlink.RemoveAll(); err != nil {
		t.Fatal(err)
	}
	if after := state(t, node); after != before {
		t.Errorf("node before:\n%s\nafter:\n%s", before, after)
	}
}

// TestAttachAgain: the name in the pod is free for the next pair, though the last one was not deleted yet.
func TestAttachAgain(t *testing.T) {
	node, pod := testnode.Enter(t), testnode.New(t)
	run(t, node, "ip addr add 10.244.1.1/32 dev lo; ip addr add fd00::1/128 dev lo")
	attach(t, pod, pair("2"))
	for _, n := range []string{"2", "3"} {
		detach(t, pair("2"), pair("3"))
		attach(t, pod, pair(n))
		run(t, pod, "ping -c 1 -W 2 10.244.1.1; ping -c 1 -W 2 fd00::1")
	}
	if err := podlink.Attach(pod.Path(), pair("4")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("beside one that is in service: %v", err)
	}
	run(t, pod, "ping -c 1 -W 2 10.244.1.1")
}

// TestAttachAgainLeavesOthersAlone: a device of that name whose other end has the index of a pair that is out of service, but in another
// namespace, is none of ours.
func TestAttachAgainLeavesOthersAlone(t *testing.T) {
	node, old, pod, foreign := testnode.Enter(t), testnode.New(t), testnode.New(t), testnode.New(t)
	attach(t, old, pair("2"))
	detach(t, pair("2"))
	index := strings.TrimPrefix(strings.TrimSpace(run(t, node, "ip -o link show type veth | grep -o 'wrn-[0-9]*'")), "wrn-")
	inOld := run(t, old, "ip -o link show eth0")
	ownIndex, _, _ := strings.Cut(inOld, ":")
	foreignPath, podPath := foreign.Path(), pod.Path()
	run(t, node, fmt.Sprintf("ip -n %s link add peer index %s type veth peer name eth0 index %s netns %s",
		base(foreignPath), index, ownIndex, base(podPath)))
	before := run(t, pod, "ip -o link show eth0")
	if err := podlink.Attach(pod.Path(), pair("3")); !errors.Is(err, fs.ErrExist) {
		t.Errorf("got %v, want %v", err, fs.ErrExist)
	}
	if after := run(t, pod, "ip -o link show eth0"); after != before {
		t.Errorf("before %s, after %s", before, after)
	}
	if after := run(t, old, "ip -o link show eth0"); after != inOld {
		t.Errorf("before %s, after %s", inOld, after)
	}
}

// base is the name of a namespace by its path.
func base(path string) string { return path[strings.LastIndex(path, "/")+1:] }
