package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// scrapePatience is how long a scrape waits for the kernel's counters.
const scrapePatience = 5 * time.Second

// metrics reads the last outcome at every scrape, so that no figure can disagree with `warrend status`, and the kernel's counters.
type metrics struct {
	node    *node
	denials denials

	ready, encryption, problems, policies, pods, peers, lastApply *prometheus.Desc
	denied, dropped, clear, flowLines, flowSuppressed             *prometheus.Desc
	handshake, received, sent                                     *prometheus.Desc
}

// newMetrics describes the figures.
func newMetrics(n *node) *metrics {
	desc := func(name, help string, labels ...string) *prometheus.Desc {
		return prometheus.NewDesc("warren_"+name, help, labels, nil)
	}
	return &metrics{
		node:       n,
		ready:      desc("ready", "1 once policy and mesh were applied and the conflist stands."),
		encryption: desc("encryption_enabled", "1 when pod traffic between nodes is encrypted, 0 with --encryption off."),
		problems:   desc("problems", "Problems that an operator has to mend, by code.", "code"),
		policies:   desc("policies", "NetworkPolicies in the cluster."),
		pods:       desc("pods", "Pods of this node, by whether a policy isolates them.", "isolated"),
		peers:      desc("peers", "Peers that the mesh wants."),
		lastApply:  desc("last_apply_timestamp_seconds", "When everything was last applied without an error."),
		denied: desc("denied_packets_total",
			"Packets that no policy of an isolated pod allows, by each policy that isolates it and the direction.", "policy", "direction"),
		dropped:        desc("dropped_packets_total", "Packets that the rules drop which stand whatever the policies, by reason.", "reason"),
		clear:          desc("clear_packets_total", "Packets of pods, and without encryption all to pods of other nodes, that left the node unencrypted as they are meant to, by where they went.", "destination"),
		flowLines:      desc("flow_log_lines_total", "Packets that got a line in the log because a policy asks for it."),
		flowSuppressed: desc("flow_log_suppressed_total", "Packets that got none because there were too many."),
		handshake:      desc("peer_handshake_age_seconds", "Time since the last handshake with a node, +Inf before the first.", "node"),
		received:       desc("peer_received_bytes_total", "Bytes received from a node through the tunnel since it has its key.", "node"),
		sent:           desc("peer_sent_bytes_total", "Bytes sent to a node through the tunnel since it has its key.", "node"),
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		m.ready, m.encryption, m.problems, m.policies, m.pods, m.peers, m.lastApply, m.denied, m.dropped, m.clear, m.flowLines, m.flowSuppressed,
		m.handshake, m.received, m.sent,
	} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	o := m.node.outcomeNow()
	gauge := func(d *prometheus.Desc, value float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value, labels...)
	}
	gauge(m.ready, number(o.ready))
	gauge(m.encryption, number(m.node.options.encryptionMode))
	counted := count(m.node.planner.snapshot())
	gauge(m.policies, float64(counted.policies))
	gauge(m.pods, float64(counted.isolated), "true")
	gauge(m.pods, float64(counted.pods-counted.isolated), "false")
	gauge(m.peers, float64(len(o.mesh.Peers)))
	if !o.applied.IsZero() {
		gauge(m.lastApply, float64(o.applied.UnixMilli())/1000)
	}
	byCode := map[string]int{}
	for _, p := range slices.Concat(o.problems, m.node.heldAddresses(o)) {
		byCode[p.Code]++
	}
	for code, count := range byCode {
		gauge(m.problems, float64(count), code)
	}
	ctx, cancel := context.WithTimeout(context.Background(), scrapePatience) // a Collector gets no context
	defer cancel()
	m.collectPackets(ctx, ch)
	if m.node.options.encryptionMode {
		m.collectPeers(ctx, ch, o.mesh.Peers)
	}
}

// collectPackets tells what was dropped and what was logged. Counters that cannot be read are left out: all other figures stand.
func (m *metrics) collectPackets(ctx context.Context, ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, value uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
	}
	counter(m.flowLines, m.node.flows.lines.Load())
	counter(m.flowSuppressed, m.node.flows.suppressed.Load())
	read, err := m.node.filter.Denied(ctx)
	if err != nil {
		m.node.log.Warn("reading the counters of dropped packets", "error", err)
		return
	}
	for labels, packets := range m.denials.add(read, m.node.planner.group) {
		switch {
		case labels.clear != "":
			counter(m.clear, packets, labels.clear)
		case labels.reason != "":
			counter(m.dropped, packets, labels.reason)
		default:
			counter(m.denied, packets, labels.policy, labels.direction)
		}
	}
}

// collectPeers tells of the tunnel's peers by their nodes. Those of a tunnel that does not answer are left out.
func (m *metrics) collectPeers(ctx context.Context, ch chan<- prometheus.Metric, planned []mesh.Peer) {
	device, err := m.node.tunnel.Status(ctx)
	if err != nil {
		m.node.log.Warn("reading the tunnel's peers", "error", err)
		return
	}
	now := m.node.clock()
	for node, p := range byNode(planned, device.Peers) {
		age := math.Inf(1)
		if !p.LastHandshake.IsZero() {
			age = now.Sub(p.LastHandshake).Seconds()
		}
		ch <- prometheus.MustNewConstMetric(m.handshake, prometheus.GaugeValue, age, node)
		ch <- prometheus.MustNewConstMetric(m.received, prometheus.CounterValue, float64(p.ReceivedBytes), node)
		ch <- prometheus.MustNewConstMetric(m.sent, prometheus.CounterValue, float64(p.SentBytes), node)
	}
}

// byNode returns the state of the planned peers by their nodes, without keys and addresses. A node that changes its key is two
// peers, which count as one. A planned peer that the device lacks has had no handshake.
func byNode(planned []mesh.Peer, device []wgdevice.PeerStatus) map[string]wgdevice.PeerStatus {
	byKey := make(map[[32]byte]wgdevice.PeerStatus, len(device))
	for _, p := range device {
		byKey[p.PublicKey] = p
	}
	nodes := make(map[string]wgdevice.PeerStatus, len(planned))
	for _, p := range planned {
		now, next := byKey[p.PublicKey], byKey[p.Next] // no peer has the zero key
		sum := wgdevice.PeerStatus{
			LastHandshake: now.LastHandshake,
			ReceivedBytes: now.ReceivedBytes + next.ReceivedBytes, SentBytes: now.SentBytes + next.SentBytes,
		}
		if next.LastHandshake.After(sum.LastHandshake) {
			sum.LastHandshake = next.LastHandshake
		}
		nodes[p.Node] = sum
	}
	return nodes
}

// number is a truth value as a figure.
func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

// serveMetrics serves /metrics, /healthz (the process answers) and /readyz (the node is ready for pods).
func (n *node) serveMetrics(ctx context.Context) error {
	if n.options.metricsAddress == "" {
		<-ctx.Done()
		return nil
	}
	registry := prometheus.NewRegistry()
	registry.MustRegister(newMetrics(n), collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{}))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("ok\n")) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if o := n.outcomeNow(); !o.ready {
			http.Error(w, errNotReady(o).Error(), http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("ok\n"))
	})

	server := &http.Server{Handler: mux, ReadHeaderTimeout: 5 * time.Second}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", n.options.metricsAddress)
	if err != nil {
		return fmt.Errorf("listening on --metrics-address=%s: %w", n.options.metricsAddress, err)
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
