package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/warren-cni/warren/pkg/lab/soak"
	"github.com/warren-cni/warren/pkg/lab/tagged"
)

// repairedWithin is how long the daemon may take to mend what others did to its rules: the time of an audit, and the audit.
const repairedWithin = 12 * time.Second

// damage is what another program does to the node.
type damage struct {
	name, command string
	// harmless says that nothing of Warren's is changed by it. past says that no packet comes to the rules of the policies any more,
	// or that these are gone: then it is up to filter.
	harmless, past bool
}

// damages are those that the daemon has to repair.
func damages() []damage {
	return []damage{
		{"sets of peers and of policies' pods flushed", `ipset list -name | grep '^WARREN-[A-Z]*[46]-' | while read set; do ipset flush $set; done`, false, false},
		{"sets of isolated pods flushed", `ipset list -name | grep -e '^WARREN-ISOLATED' -e '^WARREN-INGRESS' | while read set; do ipset flush $set; done`, false, false},
		{"all sets flushed", `ipset flush`, false, true},
		{"iptables -F FORWARD", `iptables -F FORWARD; ip6tables -F FORWARD`, false, false},
		{"ACCEPT ahead in filter FORWARD", `iptables -I FORWARD -j ACCEPT; ip6tables -I FORWARD -j ACCEPT`, true, false},
		{"member added", `ipset list -name | grep '^WARREN' | while read set; do ipset add $set 10.244.1.250 || ipset add $set fd00::250 || true; done 2>/dev/null`, false, false},
		{"iptables -t mangle -F FORWARD", `iptables -t mangle -F FORWARD; ip6tables -t mangle -F FORWARD`, false, true},
		{"jump deleted", `for tool in iptables ip6tables; do $tool-save -t mangle | sed -n 's/^-A \(FORWARD .*WARREN.*\)/\1/p' | while read rule; do eval $tool -t mangle -D $rule; done; done`, false, true},
		{"ACCEPT ahead in mangle FORWARD", `iptables -t mangle -I FORWARD -j ACCEPT; ip6tables -t mangle -I FORWARD -j ACCEPT`, false, true},
		{"hook and chains flushed", `for tool in iptables ip6tables; do $tool -t mangle -F FORWARD; $tool -t mangle -F WARREN-FORWARD; $tool -t mangle -F WARREN-POLICY; done`, false, true},
		{"chains of policies flushed", `for tool in iptables ip6tables; do $tool-save -t mangle | sed -n 's/^:\(WARREN-[A-Z]-[^ ]*\) .*/\1/p' | while read chain; do $tool -t mangle -F $chain; done; done`, false, false},
		{"iptables -t mangle -F WARREN-POLICY", `iptables -t mangle -F WARREN-POLICY; ip6tables -t mangle -F WARREN-POLICY`, false, true},
		{"iptables -t mangle -F", `iptables -t mangle -F; ip6tables -t mangle -F; for tool in iptables ip6tables; do $tool -t mangle -A PREROUTING -p tcp --dport 9 -j DROP; done`, false, true},
		{"iptables -t raw -F", `iptables -t raw -F; ip6tables -t raw -F`, false, false},
	}
}

// Whatever others do to sets, chains and hooks, the running daemon repairs it with its next audit and touches no rule of others;
// and what is denied does not pass meanwhile, also where no packet meets the policies any more.
func TestProofDriftIsRepaired(t *testing.T) {
	t.Parallel()
	s := running(t, "wpdrift", 1)
	s.write("policy", rules{name: "isolate-closed", selector: app("closed"), from: app("friend")}.object())
	node := s.Nodes[0]
	foreign := "for tool in iptables ip6tables; do $tool -P FORWARD DROP; $tool -t mangle -A PREROUTING -p tcp --dport 9 -j DROP; $tool -A INPUT -p tcp --dport 9 -j DROP; done"
	if _, err := node.Run(t.Context(), "sh", "-ec", foreign); err != nil {
		t.Fatal(err)
	}
	client, friend, closed := s.pod(0, "client"), s.pod(0, "friend"), s.pod(0, "closed")
	s.blocked(client, closed)
	s.reaches(friend, closed)
	s.healthy(0)
	counter := s.counter(closed.Netns())
	t.Cleanup(s.fire(client, tagged.Fire{Tag: tagForbidden, Targets: closed.Addresses, Port: port, Every: 10 * time.Millisecond}).Cease)
	t.Cleanup(s.fire(friend, tagged.Fire{Tag: tagAllowed, Targets: closed.Addresses, Port: port, Every: 10 * time.Millisecond}).Cease)
	s.eventually(func() error { return inFamilies(counter, tagAllowed) })

	all := damages()
	if soak.Trials(10) < 10 {
		all = []damage{together(all, false), together(all, true)} // each would take an audit
	}
	repaired, leaked := 0, 0
	var slowest time.Duration
	for _, d := range all {
		repaired++
		before, arrived := ourRules(t, s), counter.Packets(tagged.Of(tagForbidden))
		if _, err := node.Run(t.Context(), "sh", "-c", d.command); err != nil {
			t.Fatalf("%s: %v", d.name, err)
		}
		start := time.Now() //nolint:forbidigo // how long a repair takes
		if changed := ourRules(t, s) != before; changed == d.harmless {
			t.Errorf("%s changes rules of Warren: %v", d.name, changed)
		}
		s.eventually(func() error {
			if diff := cmp.Diff(before, ourRules(t, s)); diff != "" {
				return fmt.Errorf("%s is not repaired (-before +after):\n%s", d.name, diff)
			}
			return nil
		})
		took := time.Since(start)
		slowest = max(slowest, took)
		if took > soak.Beside(repairedWithin) {
			t.Errorf("%s is repaired after %v", d.name, took)
		}
		if more := counter.Packets(tagged.Of(tagForbidden)) - arrived; more > 0 {
			leaked += more
			t.Errorf("%s: %d denied packets arrived until the repair", d.name, more)
		}
		s.arrives(counter, 10, tagged.Of(tagAllowed))
		s.blocked(client, closed)
	}
	if others, err := node.Run(t.Context(), "sh", "-ec", "iptables-save; ip6tables-save"); err != nil || strings.Count(others, "--dport 9 -j DROP") != 4 {
		t.Errorf("rules of others are gone (%v):\n%s", err, others)
	}
	summary(t, "%d kinds of damage repaired, the slowest after %v; %d denied packets passed meanwhile", repaired, slowest, leaked)
	if err := s.Remove("policy"); err != nil {
		t.Fatal(err)
	}
	s.eventually(func() error { return inFamilies(counter, tagForbidden) })
}

// together are all damages of one kind in one: both kinds at once would leave nothing that denies.
func together(all []damage, past bool) damage {
	one := damage{name: fmt.Sprintf("all that goes past policies (%v)", past)}
	for _, d := range all {
		if d.past == past {
			one.command += d.command + "\n"
		}
	}
	return one
}

// ourRules are the chains, hooks and sets of Warren on the first node, in the order that counts.
func ourRules(t *testing.T, s *stage) string {
	t.Helper()
	state, err := s.Nodes[0].Run(t.Context(), "sh", "-c", `
for tool in iptables ip6tables; do
	for table in raw mangle nat filter; do $tool-save -t $table | grep '^-A.*WARREN'; done
	echo first; $tool -t mangle -S FORWARD 1; $tool -t raw -S PREROUTING 1
done
ipset save | grep -v '^create' | sort`)
	if err != nil {
		t.Fatal(err)
	}
	return state
}
