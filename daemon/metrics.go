package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// scrapePatience is how long a scrape waits for the kernel's counters.
const scrapePatience = 5 * time.Second

// metrics reads the last outcome at every scrape, so that no figure can disagree with `warrend status`, and the kernel's counters.
type metrics struct {
	node    *node
	denials denials

	ready, encryption, problems, policies, pods, peers, lastApply *prometheus.Desc
	denied, dropped, flowLines, flowSuppressed                    *prometheus.Desc
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
		flowLines:      desc("flow_log_lines_total", "Packets that got a line in the log because a policy asks for it."),
		flowSuppressed: desc("flow_log_suppressed_total", "Packets that got none because there were too many."),
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		m.ready, m.encryption, m.problems, m.policies, m.pods, m.peers, m.lastApply, m.denied, m.dropped, m.flowLines, m.flowSuppressed,
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
	for _, p := range o.problems {
		byCode[p.Code]++
	}
	for code, count := range byCode {
		gauge(m.problems, float64(count), code)
	}
	m.collectPackets(ch)
}

// collectPackets tells what was dropped and what was logged. Counters that cannot be read are left out: all other figures stand.
func (m *metrics) collectPackets(ch chan<- prometheus.Metric) {
	counter := func(d *prometheus.Desc, value uint64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
	}
	counter(m.flowLines, m.node.flows.lines.Load())
	counter(m.flowSuppressed, m.node.flows.suppressed.Load())
	ctx, cancel := context.WithTimeout(context.Background(), scrapePatience) // a Collector gets no context
	defer cancel()
	read, err := m.node.filter.Denied(ctx)
	if err != nil {
		m.node.log.Warn("reading the counters of dropped packets", "error", err)
		return
	}
	for labels, packets := range m.denials.add(read, m.node.planner.group) {
		if labels.reason != "" {
			counter(m.dropped, packets, labels.reason)
		} else {
			counter(m.denied, packets, labels.policy, labels.direction)
		}
	}
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
