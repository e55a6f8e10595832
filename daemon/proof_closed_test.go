package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/warren-cni/warren/pkg/lab"
	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// refusing is an iptables-restore that refuses any input that holds the text of the file %[2]s, as it does when the kernel does
// not take a line.
const refusing = `#!/bin/sh
input=$(cat)
if [ -s %[2]s ] && printf '%%s\n' "$input" | grep -qF -f %[2]s; then
	echo "iptables-restore: line $(printf '%%s\n' "$input" | grep -nF -f %[2]s | head -1 | cut -d: -f1) failed" >&2
	exit 1
fi
printf '%%s\n' "$input" | exec %[1]s "$@"
`

// refusingStage makes a node whose iptables-restore refuses what is written into the file that it returns.
func refusingStage(t *testing.T, name string) (s *stage, refused string) {
	t.Helper()
	s = newStage(t, name, 1)
	refused = filepath.Join(t.TempDir(), "refused")
	s.startWithRestore(refusing, refused)
	return s, refused
}

// halfPolicy isolates the pods app=half both ways, and lets friends in on two ports and out to a network.
const halfPolicy = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: half}
spec:
  podSelector: {matchLabels: {app: half}}
  policyTypes: [Ingress, Egress]
  ingress:
  - from: [{podSelector: {matchLabels: {app: friend}}}]
    ports: [{protocol: TCP, port: 8080}, {protocol: UDP, port: 9000, endPort: 9010}]
  - from: [{ipBlock: {cidr: 198.51.100.0/24, except: [198.51.100.7/32]}}, {ipBlock: {cidr: "2001:db8:1::/48"}}]
  egress:
  - to: [{ipBlock: {cidr: 203.0.113.0/24}}, {ipBlock: {cidr: "2001:db8:2::/48"}}]
`

// linesOf returns the lines of a policy that are written by iptables-restore, of both families: what names the policy, or one of
// the chains that name it.
func (s *stage) linesOf(policy string) []string {
	s.t.Helper()
	var lines []string
	seen := map[string]bool{}
	saved, err := s.Nodes[0].Run(s.t.Context(), "sh", "-ec", "iptables-save -t mangle; ip6tables-save -t mangle")
	if err != nil {
		s.t.Fatal(err)
	}
	rules := strings.Split(saved, "\n")
	chains := map[string]bool{}
	for _, line := range rules {
		if words := strings.Fields(line); len(words) > 2 && words[0] == "-A" && strings.Contains(line, policy) &&
			(strings.HasPrefix(words[1], "WARREN-I-") || strings.HasPrefix(words[1], "WARREN-E-")) {
			chains[words[1]] = true
		}
	}
	for _, line := range rules {
		words := strings.Fields(line)
		for chain := range chains {
			if len(words) > 1 && words[0] == "-A" && words[1] == chain {
				// Of each rule what tells it apart, as it is written and as it is listed: the hash in its comment.
				_, comment, found := strings.Cut(line, "--comment \"")
				hash, _, _ := strings.Cut(comment, " ")
				if found && !seen[hash] {
					seen[hash] = true
					lines = append(lines, hash)
				}
			}
		}
	}
	return lines
}

// A policy of which any single line is refused leaves the pods that it selects isolated, both ways and in both families;
// all others are enforced meanwhile, pods start, and status and log say so. Once the line is taken all is well.
func TestProofRefusedLineMeansClosed(t *testing.T) {
	t.Parallel()
	s, refused := refusingStage(t, "wprefuse")
	client, friend, half := s.pod(0, "client"), s.pod(0, "friend"), s.pod(0, "half")
	closed, open := s.pod(0, "closed"), s.pod(0, "open")
	s.writeText("half", halfPolicy)
	s.write("policy", rules{name: "isolate-closed", selector: app("closed")}.object())
	s.closes(client, half)
	s.reaches(friend, half)
	s.healthy(0)
	hashes := s.linesOf("shop/half")
	if len(hashes) < 8 {
		t.Fatalf("the policy has only %d rules: %q", len(hashes), hashes)
	}
	counter := s.counter(half.Netns())
	tried := 0
	for i, hash := range hashes {
		if i%3 > 0 && soak.Trials(10) < 10 {
			continue // the short run tries each third line
		}
		tried++
		if err := os.WriteFile(refused, []byte(hash+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		// The policy comes anew while the line is refused.
		if err := s.Remove("half"); err != nil {
			t.Fatal(err)
		}
		s.reaches(client, half)
		s.writeText("half", halfPolicy)
		problem := s.problem(0, "PolicyNotApplied", "shop/half")
		if !strings.Contains(problem.Message, "failed") {
			t.Errorf("the problem does not say what was refused: %+v", problem)
		}
		before := counter.Packets(nil)
		gun := s.fire(client, tagged.Fire{Tag: tagForbidden, Targets: half.Addresses, Port: port, Every: 10 * time.Millisecond})
		s.blocked(client, half)
		s.blocked(client, closed)
		s.reaches(client, open)
		gun.Cease()
		if arrived := counter.Packets(nil) - before; arrived > 0 {
			t.Errorf("with the line %s refused %d of %d packets arrived", hash, arrived, gun.Sent())
		}
		if !strings.Contains(s.daemons[0].Log(200), "PolicyNotApplied") {
			t.Error("the log does not tell")
		}
		if err := os.Remove(refused); err != nil {
			t.Fatal(err)
		}
		s.healthy(0)
		s.reaches(friend, half)
		s.blocked(client, half)
	}
	if err := s.Remove("half"); err != nil {
		t.Fatal(err)
	}
	counts := s.fire(client, tagged.Fire{Tag: tagAllowed, Targets: half.Addresses, Port: port, Every: 10 * time.Millisecond})
	s.eventually(func() error { return inFamilies(counter, tagAllowed) })
	counts.Cease()
	summary(t, "each of %d lines refused: the pods stay isolated, the rest is enforced", tried)
}

// sctpAndMore are policies with what is hard to enforce: another protocol, whole address spaces, impossible blocks.
const sctpAndMore = `apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: sctp}
spec:
  podSelector: {matchLabels: {app: sctp}}
  ingress: [{ports: [{protocol: SCTP, port: 8080}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: whole}
spec:
  podSelector: {matchLabels: {app: whole}}
  ingress:
  - from:
    - ipBlock: {cidr: 0.0.0.0/0, except: [10.0.0.0/8]}
    - ipBlock: {cidr: "::/0", except: ["fd00::/8"]}
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {namespace: shop, name: everybody}
spec:
  podSelector: {matchLabels: {app: everybody}}
  ingress:
  - from: [{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: "::/0"}}]
    ports: [{protocol: TCP, port: 8080}]
`

// Policies with SCTP, with whole address spaces, with many thousands of networks, and one whose set the kernel refuses: what
// can be enforced is exact, and what cannot is closed and told.
func TestProofUnenforceableMeansClosed(t *testing.T) {
	t.Parallel()
	s := running(t, "wpclosed", 1)
	client := s.pod(0, "client")
	pods := map[string]*lab.Pod{}
	for _, name := range []string{"open", "closed", "sctp", "whole", "everybody", "many", "set"} {
		pods[name] = s.pod(0, name)
	}
	s.write("policy", isolateClosed())
	s.writeText("hard", sctpAndMore)
	const networks = 70000 // more than a set holds by default, in a short run too
	s.writeText("many", manyNetworks(networks, client))
	s.eventually(func() error {
		sizes, err := s.Nodes[0].Run(t.Context(), "sh", "-ec", "ipset save | grep -c '^add'")
		if err == nil && len(strings.TrimSpace(sizes)) < 5 {
			err = fmt.Errorf("the sets have only %s members", strings.TrimSpace(sizes))
		}
		return err
	})
	s.healthy(0)
	for _, name := range []string{"open", "everybody", "many"} {
		s.reaches(client, pods[name])
	}
	for _, name := range []string{"closed", "sctp", "whole"} {
		s.closes(client, pods[name])
	}
	s.blocked(pods["open"], pods["many"])
	s.reaches(pods["sctp"], pods["open"])

	s.refuseSet(client, pods)
	summary(t, "SCTP, 0.0.0.0/0 and ::/0, %d networks, a set that the kernel refuses: closed or exact", networks)
}

// manyNetworks is a policy that lets in that many networks, and a pod's addresses.
func manyNetworks(count int, friend *lab.Pod) string {
	var text strings.Builder
	text.WriteString("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {namespace: shop, name: many}\n" +
		"spec:\n  podSelector: {matchLabels: {app: many}}\n  ingress:\n  - from:\n")
	for i := range count {
		fmt.Fprintf(&text, "    - ipBlock: {cidr: %d.%d.%d.%d/31}\n", 100+i>>23, i>>15&255, i>>7&255, i<<1&255)
	}
	for _, address := range friend.Addresses {
		fmt.Fprintf(&text, "    - ipBlock: {cidr: \"%v/%d\"}\n", address, address.BitLen())
	}
	return text.String()
}

// refuseSet has the kernel refuse a policy's sets, because others of those names are in use; and then lets it have them.
func (s *stage) refuseSet(client *lab.Pod, pods map[string]*lab.Pod) {
	s.t.Helper()
	set := rules{name: "set", selector: app("set"), from: app("nobody-yet")}.object()
	save := func() string {
		out, err := s.Nodes[0].Run(s.t.Context(), "sh", "-ec", "ipset save | grep '^create' | cut -d' ' -f2 | sort")
		if err != nil {
			s.t.Fatal(err)
		}
		return out
	}
	before := save()
	s.write("set", set)
	s.closes(client, pods["set"])
	s.healthy(0)
	var names []string
	for name := range strings.Lines(save()) {
		if !strings.Contains(before, name) {
			names = append(names, strings.TrimSpace(name))
		}
	}
	if len(names) == 0 {
		s.t.Fatal("the policy has no set")
	}
	if err := s.Remove("set"); err != nil {
		s.t.Fatal(err)
	}
	s.reaches(client, pods["set"])
	s.healthy(0)
	for _, name := range names {
		s.eventually(func() error {
			_, err := s.Nodes[0].Run(s.t.Context(), "sh", "-ec", fmt.Sprintf(
				"ipset create %[1]s bitmap:port range 1-2 && iptables -t raw -A OUTPUT -p tcp -m set --match-set %[1]s src -j ACCEPT", name))
			return err
		})
	}
	s.write("set", set)
	s.eventually(func() error {
		status, err := s.Nodes[0].Status(s.t.Context())
		if err == nil && len(status.Problems) == 0 {
			err = fmt.Errorf("status tells nothing")
		}
		return err
	})
	s.blocked(client, pods["set"])
	s.blocked(client, pods["closed"])
	s.reaches(client, pods["open"])
	status := s.status(0)
	if !strings.Contains(s.daemons[0].Log(200), status.Problems[0].Code) {
		s.t.Error("the log does not tell")
	}
	s.t.Logf("with its sets refused: %+v", status.Problems)
	for _, name := range names {
		if _, err := s.Nodes[0].Run(s.t.Context(), "sh", "-ec", fmt.Sprintf(
			"iptables -t raw -D OUTPUT -p tcp -m set --match-set %[1]s src -j ACCEPT; ipset destroy %[1]s || true", name)); err != nil {
			s.t.Fatal(err)
		}
	}
	s.healthy(0)
	s.blocked(client, pods["set"])
	if err := s.Remove("set"); err != nil {
		s.t.Fatal(err)
	}
	s.reaches(client, pods["set"])
}
