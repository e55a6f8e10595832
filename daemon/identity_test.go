package main

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/warren-cni/warren/pkg/lab"
)

// reuseAddresses lets the next pod of a node have the first free address, as if the node had leased all others meanwhile and
// those that were released had cooled down.
func (s *stage) reuseAddresses(i int) {
	s.t.Helper()
	remembered := filepath.Join(s.Nodes[i].Leases(), ".lock")
	if err := errors.Join(s.Nodes[i].EndCoolDown(s.t.Context()), os.Truncate(remembered, 0)); err != nil {
		s.t.Fatal(err)
	}
}

// udpEcho answers datagrams in a network namespace.
func udpEcho(ctx context.Context, netns ns.NetNS) (*net.UDPConn, error) {
	var server *net.UDPConn
	err := netns.Do(func(ns.NetNS) error {
		conn, err := new(net.ListenConfig).ListenPacket(ctx, "udp", ":8080")
		if err != nil {
			return err
		}
		server = conn.(*net.UDPConn)
		return nil
	})
	if err != nil {
		return nil, err
	}
	go func() {
		buffer := make([]byte, 100)
		for {
			n, from, err := server.ReadFromUDPAddrPort(buffer)
			if err != nil {
				return
			}
			_, _ = server.WriteToUDPAddrPort(buffer[:n], from)
		}
	}()
	return server, nil
}

// echoTime is how long an answer takes at most.
const echoTime = 20 * time.Millisecond

// answered sends datagrams and says whether one is answered before the time is over.
func answered(client net.Conn, patience time.Duration) bool {
	buffer := make([]byte, 100)
	for range patience / echoTime {
		_, _ = client.Write([]byte("ping"))
		_ = client.SetReadDeadline(time.Now().Add(echoTime)) //nolint:forbidigo // sockets know no contexts
		if _, err := client.Read(buffer); err == nil {
			return true
		}
	}
	return false
}

// A connection to a pod ends with the pod: who has its address next is not reached by it past its policies.
func TestConnectionEndsWithItsPod(t *testing.T) {
	s := running(t, "wdident", 1)
	s.write("policy", isolateClosed())
	client := s.pod(0, "client")
	open, err := s.Nodes[0].AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: "open"})
	if err != nil {
		t.Fatal(err)
	}
	server, err := udpEcho(t.Context(), open.Netns())
	if err != nil {
		t.Fatal(err)
	}
	var flows []net.Conn
	for _, address := range open.Addresses {
		var flow net.Conn
		err := client.Netns().Do(func(ns.NetNS) error {
			flow, err = new(net.Dialer).DialContext(t.Context(), "udp", netip.AddrPortFrom(address, 8080).String())
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
		if !answered(flow, changePatience) {
			t.Fatalf("no answer from %v", address)
		}
		flows = append(flows, flow)
	}
	_ = server.Close()
	if err := open.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.reuseAddresses(0)
	closed, err := s.Nodes[0].AddPod(t.Context(), lab.Pod{Namespace: "shop", Name: "closed", Labels: map[string]string{"app": "closed"}})
	if err != nil {
		t.Fatal(err)
	}
	if closed.Addresses[0] != open.Addresses[0] {
		t.Fatalf("the address is %v, not %v", closed.Addresses, open.Addresses)
	}
	if _, err = udpEcho(t.Context(), closed.Netns()); err != nil {
		t.Fatal(err)
	}
	for _, flow := range flows {
		if answered(flow, closedPatience) {
			t.Errorf("the connection to %v reaches the pod that has the address now", flow.RemoteAddr())
		}
	}
}

// A pod whose phase says that it is over has no identity any more, so nothing of it passes while its link still stands.
func TestFinishedPodIsClosed(t *testing.T) {
	s := running(t, "wdfinish", 1)
	s.write("policy", isolateClosed())
	client, closed := s.pod(0, "client"), s.pod(0, "closed")
	s.blocked(client, closed)
	s.write("pod-shop-closed", corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "closed", UID: closed.UID, Labels: closed.Labels},
		Spec:       corev1.PodSpec{NodeName: "node-1", Containers: []corev1.Container{{Name: "main", Image: "none"}}},
		Status:     corev1.PodStatus{Phase: corev1.PodFailed},
	})
	s.pod(0, "later") // once it is attached, the daemon has read the object
	s.blocked(client, closed)
}

// slowly is an iptables-restore that takes its time as long as the file %[2]s is there.
const slowly = `#!/bin/sh
input=$(cat)
[ -e %[2]s ] && sleep 4
printf '%%s\n' "$input" | exec %[1]s "$@"
`

// An address that changed hands while the daemon was applying is not let pass for who had it before.
func TestAddressChangesHandsWhileApplying(t *testing.T) {
	s := newStage(t, "wdhands", 1)
	slow := filepath.Join(t.TempDir(), "slow")
	s.startWithRestore(slowly, slow)
	isolateOther := isolateClosed()
	isolateOther.Name, isolateOther.Spec.PodSelector.MatchLabels = "isolate-other", map[string]string{"app": "other"}
	s.write("policy-other", isolateOther)
	s.write("policy", isolateClosed())
	client, other := s.pod(0, "client"), s.pod(0, "other")
	s.blocked(client, other)
	s.healthy(0)

	if err := os.WriteFile(slow, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	add := func(name string) error {
		_, err := s.Nodes[0].AddPod(t.Context(), lab.Pod{
			Namespace: "shop", Name: name, Labels: map[string]string{"app": name},
			Listen: func(netns ns.NetNS) error { _, err := lab.NewEcho(t.Context(), netns, port); return err },
		})
		return err
	}
	address := netip.AddrPortFrom(other.Addresses[0].Next(), port)
	// The rules are written anew, without any pod that is isolated.
	if err := s.Remove("policy-other"); err != nil {
		t.Fatal(err)
	}
	if err := add("first"); err == nil || !strings.Contains(err.Error(), "not known") {
		t.Fatalf("the first pod: %v", err)
	}
	s.reuseAddresses(0)
	reached := make(chan error, 1)
	probing, stop := context.WithCancel(t.Context())
	go func() {
		reached <- lab.Until(probing, func() error {
			ctx, cancel := context.WithTimeout(probing, 200*time.Millisecond)
			defer cancel()
			return lab.Probe(ctx, client.Netns(), address, marker)
		})
	}()
	t.Log(add("closed")) // it may be refused, as long as the kernel takes its time
	stop()
	if <-reached == nil {
		t.Errorf("a pod that nobody may reach was reached at %v", address)
	}
}

// What the status of another node's pod says of this node's addresses gives nobody an identity.
func TestForeignAddressIsNoIdentity(t *testing.T) {
	s := running(t, "wdforeign", 1)
	policy := isolateClosed()
	policy.Spec.Ingress = []networkingv1.NetworkPolicyIngressRule{{From: []networkingv1.NetworkPolicyPeer{{
		PodSelector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "friend"}},
	}}}}
	s.write("policy", policy)
	client, friend, closed := s.pod(0, "client"), s.pod(0, "friend"), s.pod(0, "closed")
	s.reaches(friend, closed)
	s.blocked(client, closed)

	far := corev1.Pod{
		TypeMeta:   metav1.TypeMeta{APIVersion: "v1", Kind: "Pod"},
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "far", UID: "far", Labels: map[string]string{"app": "friend"}},
		Spec:       corev1.PodSpec{NodeName: "node-9", Containers: []corev1.Container{{Name: "main", Image: "none"}}},
	}
	for _, address := range client.Addresses {
		far.Status.PodIPs = append(far.Status.PodIPs, corev1.PodIP{IP: address.String()})
	}
	s.write("pod-far", far)
	s.pod(0, "later") // once it is attached, the daemon has read the object
	s.blocked(client, closed)
	s.reaches(friend, closed)
}
