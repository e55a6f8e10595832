package guard_test

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/internal/trace"
	"github.com/warren-cni/warren/pkg/netfilter"
)

// What goes through FORWARD goes on as it was, without any bit of its mark changed; what went round our rules there does not.
func TestJudged(t *testing.T) {
	filters := load(t, guard.Compile(dual()))
	answer, related, invalid := state("ESTABLISHED"), state("RELATED"), state("INVALID")
	for _, c := range []struct {
		name   string
		packet trace.Packet
		// judged and missed are what becomes of the packet in POSTROUTING with our rules in FORWARD and without them.
		judged, missed string
	}{
		{"pod to pod", route("wrn1", "wrn2", "10.244.1.7", "10.244.1.3"), "", "DROP"},
		{"pod to a remote pod", route("wrn1", "warren0", "10.244.1.7", "10.244.2.9"), "", "DROP"},
		{"pod to the world", route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), "", "DROP"},
		{"remote pod to a pod", route("warren0", "wrn1", "10.244.2.9", "10.244.1.7"), "", "DROP"},
		{"world to a pod", route("eth0", "wrn1", "192.0.2.1", "10.244.1.7"), "", "DROP"},
		{"world to a pod, IPv6", route("eth0", "wrn1", "2001:db8::1", "fd00:10:244:1::7"), "", "DROP"},
		{"pod to the world, IPv6", route("wrn1", "eth0", "fd00:10:244:1::7", "2001:db8::1"), "", "DROP"},
		{"world to a pod whose address is no pod's here", route("eth0", "wrn1", "192.0.2.1", "10.9.9.9"), "DROP", "DROP"},
		{"the same, cut", with(with(route("eth0", "wrn1", "192.0.2.1", "10.9.9.9"), answer), cut), "DROP", "DROP"},
		{"established, of a pod", with(with(route("wrn1", "eth0", "10.244.1.7", "192.0.2.1"), answer), translated), "", ""},
		{"established, to a pod", with(route("eth0", "wrn1", "192.0.2.1", "10.244.1.7"), answer), "", ""},
		{"an error about it", with(route("eth0", "wrn1", "192.0.2.1", "10.244.1.7"), related), "", ""},
		{"established, but cut", with(with(route("eth0", "wrn1", "192.0.2.1", "10.244.1.7"), answer), cut), "DROP", "DROP"},
		{"the node's error about it", with(with(with(route("", "eth0", "192.168.0.1", "192.0.2.1"), related), cut), icmp), "DROP", "DROP"},
		{"what the tunnel sends", with(route("", "eth0", "192.168.0.1", "192.168.0.2"), answer), "", ""},
		{"no connection to judge by", with(route("eth0", "wrn1", "192.0.2.1", "10.244.1.7"), invalid), "", "DROP"},
		{"another program's", route("docker0", "eth0", "172.17.0.2", "192.0.2.1"), "", ""},
		{"between remote pods", route("warren0", "warren0", "10.244.2.9", "10.244.3.9"), "", ""},
	} {
		for _, mark := range []uint32{0, ^uint32(netfilter.JudgedMark)} {
			p := with(c.packet, func(p *trace.Packet) { p.Mark = mark })
			filter := filters[netfilter.FamilyOf(p.Src)]
			missed, missedErr := filter.Walk("mangle", "POSTROUTING", p)
			first, firstErr := filter.Walk("mangle", "FORWARD", p)
			got, gotErr := filter.Walk("mangle", "POSTROUTING", with(p, func(p *trace.Packet) { p.Mark = first.Mark }))
			if err := errors.Join(missedErr, firstErr, gotErr); err != nil {
				t.Fatal(err)
			}
			if missed.Target != c.missed || got.Target != c.judged {
				t.Errorf("%s, marked %#x: %q and %q without FORWARD, want %q and %q", c.name, mark, got.Target, missed.Target, c.judged, c.missed)
			}
			if got.Target == "" && got.Mark != mark {
				t.Errorf("%s: its mark was %#x and is %#x", c.name, mark, got.Mark)
			}
		}
	}
}

// clusterIP is the address of a Service.
var clusterIP = map[netfilter.Family]string{netfilter.IPv4: "10.96.0.10", netfilter.IPv6: "fd00:10:96::a"}

// talk is a conversation by UDP. The client takes answers only from whom it asked.
type talk struct {
	n      *network
	client net.Conn
	server net.PacketConn
}

// talk begins a conversation; the server listens at its own address, to which the destination may be translated.
func (n *network) talk(from ns.NetNS, source, destination string, to ns.NetNS, at string) *talk {
	n.t.Helper()
	k := &talk{n: n}
	n.check(to.Do(func(ns.NetNS) (err error) {
		k.server, err = (&net.ListenConfig{}).ListenPacket(n.t.Context(), "udp", net.JoinHostPort(at, port))
		return err
	}))
	n.check(from.Do(func(ns.NetNS) (err error) {
		local, err := net.ResolveUDPAddr("udp", net.JoinHostPort(source, "0"))
		if err != nil {
			return err
		}
		k.client, err = (&net.Dialer{LocalAddr: local}).DialContext(n.t.Context(), "udp", net.JoinHostPort(destination, port))
		return err
	}))
	return k
}

// patiently says the same again while nothing is answered, for what must get through on a busy machine.
func (k *talk) patiently() string {
	k.n.t.Helper()
	said := k.says()
	for range 20 {
		if said == "answered" {
			break
		}
		said = k.says()
	}
	return said
}

// says sends a question and an answer and returns how far they come: "", "asked" or "answered".
func (k *talk) says() string {
	k.n.t.Helper()
	deadline := time.Now().Add(lost) //nolint:forbidigo // sockets know no contexts
	k.n.check(errors.Join(k.client.SetDeadline(deadline), k.server.SetDeadline(deadline)))
	buffer := make([]byte, 100)
	_, err := k.client.Write([]byte("question"))
	if errors.Is(err, os.ErrPermission) {
		return ""
	}
	k.n.check(err)
	_, client, err := k.server.ReadFrom(buffer)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return ""
	}
	k.n.check(err)
	_, err = k.server.WriteTo([]byte("answer"), client)
	if !errors.Is(err, os.ErrPermission) {
		k.n.check(err)
	}
	_, err = k.client.Read(buffer)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return "asked"
	}
	k.n.check(err)
	return "answered"
}

// move lets the server listen elsewhere.
func (k *talk) move(to ns.NetNS, at string) {
	k.n.t.Helper()
	k.n.check(k.server.Close())
	k.n.check(to.Do(func(ns.NetNS) (err error) {
		k.server, err = (&net.ListenConfig{}).ListenPacket(k.n.t.Context(), "udp", net.JoinHostPort(at, port))
		return err
	}))
}

func (k *talk) end() { k.n.check(errors.Join(k.client.Close(), k.server.Close())) }

// Every kind of traffic that pods have goes both ways with the rules in place. When the jump from FORWARD is gone, only what had
// begun before and what is the node's own does.
func TestJudgedPackets(t *testing.T) {
	n := newNetwork(t)
	n.load(dual())
	for _, f := range netfilter.Families {
		t.Log(f)
		tool := map[netfilter.Family]string{netfilter.IPv4: "iptables", netfilter.IPv6: "ip6tables"}[f]
		n.serve(f, tool)
		kinds := []struct {
			name                string
			from                ns.NetNS
			source, destination string
			to                  ns.NetNS
			at                  string
			own                 bool // the node's own
		}{
			{"the node to its pod", n.node, nodeUplink[f], localPod[f], n.pod, localPod[f], true},
			{"pod to its node", n.pod, localPod[f], nodeUplink[f], n.node, nodeUplink[f], true},
			{"the node to a Service of its pod", n.node, nodeUplink[f], clusterIP[f], n.pod, localPod[f], true},
			{"pod to a remote pod", n.pod, localPod[f], remotePod[f], n.remote, remotePod[f], false},
			{"remote pod to a pod", n.remote, remotePod[f], localPod[f], n.pod, localPod[f], false},
			{"remote pod to a Service of a pod", n.remote, remotePod[f], clusterIP[f], n.pod, localPod[f], false},
			{"pod to a Service of its own", n.pod, localPod[f], clusterIP[f], n.pod, localPod[f], false},
			{"host to a Service of a pod", n.lan, lanHost[f], clusterIP[f], n.pod, localPod[f], false},
			{"masqueraded", n.pod, localPod[f], lanHost[f], n.lan, lanHost[f], false},
		}
		for _, k := range kinds {
			before := n.talk(k.from, k.source, k.destination, k.to, k.at)
			n.expect(k.name, before.says(), "answered")
			hook := []string{tool, "-t", "mangle", "-D", "FORWARD", "-m", "comment", "--comment", "warren", "-j", "WARREN-FORWARD"}
			n.run(n.node, "", hook...)
			n.expect(k.name+", begun before", before.says(), "answered")
			before.end()
			meanwhile := n.talk(k.from, k.source, k.destination, k.to, k.at)
			n.expect(k.name+", meanwhile", meanwhile.says(), map[bool]string{true: "answered", false: ""}[k.own])
			hook[3] = "-I"
			n.run(n.node, "", hook...)
			n.expect(k.name+", repaired", meanwhile.says(), "answered")
			meanwhile.end()
		}
		n.expect("refused on the way", n.dial(lanHost[f]), unix.ECONNREFUSED.Error())
		n.ip(n.node, "link set eth0 mtu 1280")
		n.expect("too big on the way", n.sendBig(lanHost[f]), unix.EMSGSIZE.Error())
		n.ip(n.node, "link set eth0 mtu 1500")
	}
}

// serve translates the Service's address to the pod's, as kube-proxy does, and resets connections on the way to the LAN.
func (n *network) serve(f netfilter.Family, tool string) {
	n.t.Helper()
	for _, chain := range []string{"PREROUTING", "OUTPUT"} {
		n.run(n.node, "", tool, "-t", "nat", "-A", chain, "-d", clusterIP[f], "-j", "DNAT", "--to-destination", localPod[f])
	}
	n.run(n.node, "", tool, "-t", "nat", "-A", "POSTROUTING", "-s", localPod[f], "-d", localPod[f], "-j", "MASQUERADE")
	n.run(n.node, "", tool, "-I", "FORWARD", "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")
	n.ip(n.node, "route add "+clusterIP[f]+" dev eth0")
}

// dial opens a TCP connection from the pod and returns the error number.
func (n *network) dial(destination string) string {
	n.t.Helper()
	err := n.pod.Do(func(ns.NetNS) error {
		conn, err := (&net.Dialer{Timeout: lost}).DialContext(n.t.Context(), "tcp", net.JoinHostPort(destination, port))
		if err == nil {
			err = conn.Close()
		}
		return err
	})
	return number(err)
}

// sendBig sends a packet from the pod that does not fit the node's uplink, and returns the error number that comes back.
func (n *network) sendBig(destination string) string {
	n.t.Helper()
	k := n.talk(n.pod, "", destination, n.lan, destination)
	defer k.end()
	_, err := k.client.Write(make([]byte, 1400))
	n.check(err)
	n.check(k.client.SetDeadline(time.Now().Add(lost))) //nolint:forbidigo // sockets know no contexts
	_, err = k.client.Read(make([]byte, 100))
	return number(err)
}

// number returns the text of the error number that an error holds.
func number(err error) string {
	if errno, ok := errors.AsType[unix.Errno](err); ok {
		return errno.Error()
	}
	return "no error number"
}
