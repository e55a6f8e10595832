package proof

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

const (
	// tagDenied is of packets that a policy denies, tagKept of those that it does not.
	tagDenied, tagKept uint32 = 11, 12
	// convergedWithin is how long the daemon may take, once the API server is back, to do what happened meanwhile.
	convergedWithin = 10 * time.Second
	// maxLoad is the share of a processor that a daemon may take that waits for the API server.
	maxLoad = 0.05
	// tick is the unit in which the kernel counts processor time.
	tick = 10 * time.Millisecond
)

// away is how long the API server is away: 10 minutes in a soak, else longer than it takes until a dead connection is noticed.
func away() time.Duration {
	const full = 10
	if soak.Trials(full) == full {
		return full * time.Minute
	}
	return 12 * time.Second
}

// The API server is away, answers errors or nothing at all: what stands stays in force, for a daemon that restarts meanwhile, too,
// which waits without wasting the processor. When the server is back the node does within 10 s what happened meanwhile.
func TestProofServerAway(t *testing.T) {
	for name, outage := range map[string]func(c *cluster) (end func()){
		"refused":     (*cluster).refuse,
		"black-holed": (*cluster).blackHole,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := newCluster(t, map[string]string{"refused": "wpaway", "black-holed": "wphole"}[name])
			c.createNamespace("a", nil)
			c.isolate("isolate", "closed")
			client, closed, open := c.runPod("client"), c.runPod("closed"), c.runPod("open")
			atClosed, atOpen := c.count(closed), c.count(open)
			c.fire(client, closed, tagDenied)
			c.fire(client, open, tagKept)
			c.arrives(atOpen)

			end := outage(c)
			if err := c.client.NetworkingV1().NetworkPolicies("a").Delete(t.Context(), "isolate", metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
			c.isolate("isolate-open", "open")
			half := away() / 2
			load := c.load(half)
			if err := c.daemon.Kill(); err != nil {
				t.Fatal(err)
			}
			c.daemon = c.startDaemon(c.node, c.proxy)
			restarted := c.load(half)
			c.arrives(atOpen)
			denied := atClosed.Packets(tagged.Of(tagDenied))
			if denied > 0 {
				t.Errorf("%d packets arrived that the policy denies", denied)
			}
			if max(load, restarted) > maxLoad {
				t.Errorf("the daemon takes %.1f %% of a processor, and %.1f %% after a restart", 100*load, 100*restarted)
			}
			gap := atOpen.Gap(nil)

			end()
			back := time.Now() //nolint:forbidigo // how long it takes
			c.eventually(func() error {
				before := atOpen.Packets(nil)
				c.pause()
				if atClosed.Packets(tagged.Of(tagDenied)) == 0 || atOpen.Packets(nil) > before {
					return errors.New("what happened meanwhile is not in force")
				}
				return nil
			})
			took := time.Since(back)
			if took > convergedWithin {
				t.Errorf("what happened meanwhile was in force %v after the API server was back", took)
			}
			t.Logf("proof: API server %s for %v: %d denied packets arrived, allowed ones had no gap above %v, the daemon took %.1f %% of a processor and %.1f %% after a restart, converged %v after the return",
				name, 2*half, denied, gap, 100*load, 100*restarted, took)
		})
	}
}

// refuse ends all watches and has everything else answered with an error.
func (c *cluster) refuse() (end func()) {
	c.proxy.fail(http.StatusServiceUnavailable, isAny)
	c.proxy.cut()
	return c.proxy.recover
}

// blackHole drops what goes to the API server and what comes from it.
func (c *cluster) blackHole() (end func()) {
	c.t.Helper()
	change := func(how string) {
		rule := fmt.Sprintf("iptables -%[1]s INPUT -i lo -p tcp --dport %[2]d -j DROP; iptables -%[1]s INPUT -i lo -p tcp --sport %[2]d -j DROP", how, c.proxy.port)
		if _, err := c.node.Run(c.t.Context(), "sh", "-ec", rule); err != nil {
			c.t.Fatal(err)
		}
	}
	change("I")
	return func() { change("D") }
}

// runPod makes a pod of the namespace a; its label app is its name.
func (c *cluster) runPod(name string) *lab.Pod {
	c.t.Helper()
	object := c.createPod("a", name, c.node.Name, map[string]string{"app": name})
	pod, err := c.node.AddPod(c.t.Context(), lab.Pod{Namespace: "a", Name: name, UID: object.UID})
	if err != nil {
		c.t.Fatal(err)
	}
	return pod
}

// count counts what arrives at a pod.
func (c *cluster) count(pod *lab.Pod) *tagged.Counter {
	c.t.Helper()
	counter, err := tagged.Count(pod.Netns())
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() {
		if err := counter.Stop(); err != nil {
			c.t.Error(err)
		}
	})
	return counter
}

// fire lets a pod send to another until the test ends.
func (c *cluster) fire(from, to *lab.Pod, tag uint32) {
	c.t.Helper()
	gun, err := tagged.Start(c.t.Context(), from.Netns(), tagged.Fire{Tag: tag, Targets: to.Addresses, Port: port, Every: 2 * often})
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(gun.Cease)
}

// arrives waits until more packets arrive.
func (c *cluster) arrives(counter *tagged.Counter) {
	c.t.Helper()
	before := counter.Packets(nil)
	c.eventually(func() error {
		if counter.Packets(nil) == before {
			return errors.New("nothing arrives")
		}
		return nil
	})
}

// load returns the share of a processor that the daemon takes for a while.
func (c *cluster) load(d time.Duration) float64 {
	c.t.Helper()
	before := c.processorTime()
	ctx, cancel := context.WithTimeout(c.t.Context(), d)
	defer cancel()
	<-ctx.Done()
	return float64(c.processorTime()-before) / float64(d)
}

// processorTime is what the daemon's process has used (proc(5), fields 14 and 15 of stat).
func (c *cluster) processorTime() time.Duration {
	c.t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", c.daemon.PID()))
	if err != nil {
		c.t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ") // behind the name
	fields := strings.Fields(rest)
	var ticks int
	for _, field := range fields[11:13] {
		n, err := strconv.Atoi(field)
		if err != nil {
			c.t.Fatal(err)
		}
		ticks += n
	}
	return time.Duration(ticks) * tick
}
