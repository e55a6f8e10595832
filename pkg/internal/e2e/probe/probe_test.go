package main

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// closeOf closes c.
func closeOf(t *testing.T, c io.Closer) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Errorf("closing: %v", err)
	}
}

// echoServer serves on a free port of loopback until the test ends.
func echoServer(t *testing.T) string {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	packets, err := net.ListenPacket("udp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	go echoPackets(packets)
	done := make(chan error, 1)
	go func() { done <- serveOn(ctx, listener, []io.Closer{listener, packets}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("serving: %v", err)
		}
	})
	return listener.Addr().String()
}

func TestReachTellsEchoFromSilenceAndRefusal(t *testing.T) {
	address := echoServer(t)
	silent, err := net.ListenPacket("udp", "127.0.0.1:0") // takes datagrams and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer closeOf(t, silent)
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refusing := closed.Addr().String()
	closeOf(t, closed)

	var out bytes.Buffer
	args := []string{
		"reach", "-marker", strings.Repeat("m", 32), "-timeout", "300ms",
		"tcp/" + address, "udp/" + address, "udp/" + silent.LocalAddr().String(), "tcp/" + refusing, "nonsense",
	}
	if err = run(t.Context(), args, nil, &out); err != nil {
		t.Fatal(err)
	}
	var got []result
	if err = json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatal(err)
	}
	for i := range got {
		if got[i].Reached != (got[i].Error == "") {
			t.Errorf("%s: reached is %v with the error %q", got[i].Target, got[i].Reached, got[i].Error)
		}
		got[i].Error = ""
	}
	want := []result{
		{Target: "tcp/" + address, Reached: true},
		{Target: "udp/" + address, Reached: true},
		{Target: "udp/" + silent.LocalAddr().String(), Silent: true},
		{Target: "tcp/" + refusing},
		{Target: "nonsense"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("results (-want +got):\n%s", diff)
	}
}

// flowsUntil runs flows to an address, calls during once they are established, and returns the reports.
func flowsUntil(t *testing.T, address string, during func()) map[string]report {
	t.Helper()
	in, end := io.Pipe()
	out, toOut := io.Pipe()
	done := make(chan error, 1)
	go func() {
		done <- run(t.Context(), []string{"flows", "-tcp", "3", "-udp", "2", "-rate", "100", address}, in, toOut)
		closeOf(t, toOut)
	}()
	line := make([]byte, len("established\n"))
	if _, err := io.ReadFull(out, line); err != nil || string(line) != "established\n" {
		t.Fatalf("first line %q, error %v", line, err)
	}
	during()
	closeOf(t, end)
	var reports map[string]report
	if err := json.NewDecoder(out).Decode(&reports); err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.Discard, out); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	return reports
}

func TestFlowsRunUndisturbed(t *testing.T) {
	address := echoServer(t)
	reports := flowsUntil(t, address, func() { <-time.After(300 * time.Millisecond) })
	for network, flows := range map[string]int{"tcp": 3, "udp": 2} {
		r := reports[network]
		if r.Flows != flows || r.Errors != 0 || r.Received == 0 || r.Sent < r.Received || r.LongestGap == 0 {
			t.Errorf("%s: %+v", network, r)
		}
	}
}

func TestFlowsCountWhatIsCut(t *testing.T) {
	// A server that answers the first message of each connection and then resets it.
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	packets, err := net.ListenPacket("udp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer closeOf(t, packets)
	go echoPackets(packets)
	defer closeOf(t, listener)
	cut := make(chan struct{})
	wasCut := make(chan struct{}, 3)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				message := make([]byte, messageSize)
				_, _ = io.ReadFull(conn, message)
				_, _ = conn.Write(message)
				<-cut
				_ = conn.(*net.TCPConn).SetLinger(0)
				_ = conn.Close()
				wasCut <- struct{}{}
			}()
		}
	}()
	reports := flowsUntil(t, listener.Addr().String(), func() {
		close(cut)
		for range 3 {
			<-wasCut
		}
		<-time.After(100 * time.Millisecond)
	})
	if r := reports["tcp"]; r.Errors != 3 || r.FirstError == "" {
		t.Errorf("three flows were reset: %+v", r)
	}
	if r := reports["udp"]; r.Errors != 0 || r.Received == 0 {
		t.Errorf("the UDP flows were not: %+v", r)
	}
}

func TestPourCountsWhatComesBackAfterTheHeadStart(t *testing.T) {
	const head = 1 << 20
	result, err := pour(t.Context(), echoServer(t), head, 100*time.Millisecond)
	if err != nil || result.Bytes == 0 || result.Elapsed < 100*time.Millisecond {
		t.Errorf("poured %+v, %v", result, err)
	}
	refusing, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer closeOf(t, refusing)
	go func() {
		if conn, err := refusing.Accept(); err == nil {
			_ = conn.Close()
		}
	}()
	if result, err = pour(t.Context(), refusing.Addr().String(), head, time.Minute); err == nil {
		t.Errorf("a server that closes: %+v", result)
	}
}
