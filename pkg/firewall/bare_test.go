package firewall

import "testing"

// A node is bare before the first apply and after a cleanup, whatever other programs have there; one set or one chain ends that.
func TestBare(t *testing.T) {
	onEach(t, func(n *node) {
		t := n.t
		n.iptables("-t mangle -I FORWARD -i eth7 -j ACCEPT")
		n.run("ipset create other hash:ip")
		w := n.firewall()
		expect := func(when string, want bool) {
			t.Helper()
			if got, err := w.Bare(t.Context()); err != nil || got != want {
				t.Errorf("%s: bare is %v (%v), want %v", when, got, err, want)
			}
		}
		expect("at first", true)
		n.apply(w, sample())
		expect("applied", false)
		n.iptables("-t mangle -F")
		expect("hooks and rules flushed", false)
		if err := Cleanup(t.Context(), w.log); err != nil {
			t.Fatal(err)
		}
		expect("cleaned up", true)
		n.run("ipset create WARREN-NODES4 hash:net")
		expect("one set left", false)
	})
}
