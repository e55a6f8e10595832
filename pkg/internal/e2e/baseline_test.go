//go:build e2e

package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"
)

// testBaseline applies the examples that clusters start from, one on top of the other, and checks after each what a pod of
// that namespace reaches: an open pod by address and by name, and the API server.
func (c *cluster) testBaseline(t *testing.T) {
	const namespace, outside = "e2e-baseline", "e2e-baseline-outside"
	c.namespace(t, namespace)
	c.namespace(t, outside)
	label := map[string]string{"app": "open"}
	client, open := &probePod{name: "client", node: c.worker}, &probePod{name: "open", node: c.controlPlane, labels: label}
	c.start(t, namespace, client)
	c.start(t, outside, open)
	c.startService(t, outside, "open", label, open.name)
	say := func(answers ...string) {
		t.Helper()
		server := "open." + outside + ".svc.cluster.local.:8080"
		c.awaitAnswers(t, namespace, client.name, map[string]string{
			hostPort(open.addresses[0], port):           answers[0],
			hostPort(open.addresses[1], port):           answers[0],
			server:                                      answers[1],
			"kubernetes.default.svc.cluster.local.:443": answers[2],
		})
	}
	const reached, nameless, silent = "", "DNS", "TIMEOUT"
	say(reached, reached, reached)
	for _, denyAll := range []string{"deny-all-empty-lists.yaml", "deny-all.yaml"} {
		t.Run(denyAll, func(t *testing.T) {
			c.applyExample(t, namespace, denyAll)
			say(silent, nameless, nameless)
			c.awaitAnswers(t, outside, open.name, map[string]string{
				hostPort(client.addresses[0], port): silent, hostPort(client.addresses[1], port): silent,
			})
			if strings.Contains(denyAll, "empty") {
				return
			}
			c.applyExample(t, namespace, "allow-dns.yaml")
			say(silent, silent, silent)
			c.applyExample(t, namespace, "allow-apiserver.yaml")
			say(silent, silent, reached)
		})
	}
	say(reached, reached, reached)
}

// applyExample applies an example to a namespace until the test ends.
func (c *cluster) applyExample(t *testing.T, namespace, name string) {
	t.Helper()
	c.applyFile(t, "manifests/examples/"+name, "--namespace", namespace)
}

// awaitAnswers waits until agnhost in a pod says of each server what is wanted: nothing if it reaches it, or one of its words
// TIMEOUT and DNS.
func (c *cluster) awaitAnswers(t *testing.T, namespace, pod string, want map[string]string) {
	t.Helper()
	eventually(t, time.Minute, namespace+"/"+pod+" reaches what it may", func(ctx context.Context) error {
		errs := make(chan error, len(want))
		for server, word := range want {
			go func() { errs <- c.answers(ctx, namespace, pod, server, word) }()
		}
		var all error
		for range want {
			all = errors.Join(all, <-errs)
		}
		return all
	})
}

// answers returns an error unless agnhost in a pod says a word of a server.
func (c *cluster) answers(ctx context.Context, namespace, pod, server, word string) error {
	_, err := try(ctx, command{name: c.tool("kubectl"), args: []string{
		"exec", "--namespace", namespace, pod, "--", "/agnhost", "connect", server, "--timeout=2s",
	}})
	switch {
	case word == "":
		return err
	case err == nil:
		return fmt.Errorf("%s/%s reaches %s, want %s", namespace, pod, server, word)
	case !strings.Contains(err.Error(), "\n"+word):
		return fmt.Errorf("%s/%s to %s, want %s: %w", namespace, pod, server, word, err)
	default:
		return nil
	}
}
