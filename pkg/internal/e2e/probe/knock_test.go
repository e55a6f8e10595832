package main

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// freeAddress is an address of loopback where nobody listens.
func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer closeOf(t, listener)
	return listener.Addr().String()
}

// listenFor listens for a marker until ctx ends, and hands over each visitor.
func listenFor(ctx context.Context, t *testing.T, address, marker string) <-chan heard {
	t.Helper()
	out, toOut := io.Pipe()
	go func() {
		toOut.CloseWithError(run(ctx, []string{"knock", "-listen", address, "-marker", marker}, nil, toOut))
	}()
	visitors := make(chan heard, 10)
	go func() {
		defer close(visitors)
		for decoder := json.NewDecoder(out); ; {
			var visitor heard
			if err := decoder.Decode(&visitor); err != nil {
				if !errors.Is(err, io.EOF) {
					t.Error(err)
				}
				return
			}
			visitors <- visitor
		}
	}()
	return visitors
}

func TestKnocksAreHeardOnceAndOnlyWithTheMarker(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	listening, deaf := freeAddress(t), freeAddress(t)
	visitors, none := listenFor(ctx, t, listening, "mine"), listenFor(ctx, t, deaf, "other")

	in, targets := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- run(t.Context(), []string{"knock", "-stdin", "-interval", "10ms", "-marker", "mine"}, in, io.Discard)
	}()
	for _, target := range []string{"udp/" + deaf, "tcp/" + deaf, "udp/" + listening, "tcp/" + listening} {
		if _, err := io.WriteString(targets, target+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	got := map[heard]int{}
	for range 2 {
		got[<-visitors]++
	}
	closeOf(t, targets)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	cancel()
	for visitor := range visitors {
		got[visitor]++
	}
	want := map[heard]int{{Network: "tcp", From: "127.0.0.1"}: 1, {Network: "udp", From: "127.0.0.1"}: 1}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("heard (-want +got):\n%s", diff)
	}
	for visitor := range none {
		t.Errorf("heard without the marker: %+v", visitor)
	}
}

func TestKnockRefusesAStrangeTarget(t *testing.T) {
	if err := run(t.Context(), []string{"knock", "icmp/127.0.0.1:1"}, nil, io.Discard); err == nil {
		t.Error("want an error")
	}
}
