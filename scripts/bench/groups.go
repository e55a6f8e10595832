package main

import (
	"context"
	"fmt"
	"io"
)

// settings are those of a run.
type settings struct {
	// binaries is the directory of warren and warrend.
	binaries string
	rounds   int
	// progress is where it is told what is going on.
	progress io.Writer
}

// group is what is measured together, under one name.
type group struct {
	name, about string
	run         func(context.Context, settings) ([]line, error)
}

// The unit in which packages report the processor time of one operation, and what makes of it milliseconds and microseconds.
const (
	nanoseconds    = "cpu-ns/op"
	toMilliseconds = 1e-6
	toMicroseconds = 1e-3
)

// groups are all there are.
func groups() []group {
	return []group{
		{"compile", "a cluster seen for the first time becomes rules", compileSuite().run},
		{"label-flip", "one pod's label, from the cluster's news to the change of the sets", labelSuite().run},
		{"set-apply", "members of sets into the kernel, against netlink and against messages made by hand", setSuite().run},
		{"rule-apply", "one chain into the kernel, against a bare iptables-restore, and against writing everything", ruleSuite().run},
		{"event", "one event into the kernel, against working out, saving and restoring everything", eventSuite().run},
		{"enforce", "a policy in a real API server to the first packet judged anew", enforceSuite().run},
		{"first-packets", "pods that send, and are sent to, from their first instant", firstSuite().run},
		{"revoke", "a change that forbids an established connection to that connection's last packet", revokeSuite().run},
		{"datapath", "what gets through under policies, of what does without", datapathSuite().run},
		{"encryption", "from node to node, against WireGuard's own program configured by hand", encryptionSuite().run},
		{"churn", "events of a pod's watch, against bare decoding", churnSuite().run},
		{"restart", "adopting what stands, against iptables-save and ipset save", restartSuite().run},
		{"mesh", "WireGuard's peers: all at once, against a bare client, and one of many", meshSuite().run},
		{"status", "the plugin's STATUS on a node with 250 leases, from its start to its end", statusSuite().run},
		{"ipam", "the choice of an address, its lease on a tmpfs against the least system calls and " + peer + ", and reading all leases", leaseSuite().run},
		{"join", "a node among many that joins, changes its key or leaves: the daemon's whole step", joinSuite().run},
		{"links", "ADD and DEL of the plugin, against " + peer, measureLinks},
	}
}

func compileSuite() suite {
	const small, large, huge = "Compile/namespaces=100/pods=5000/policies=1000/local=50",
		"Compile/namespaces=5000/pods=250000/policies=10000/local=200",
		"Compile/namespaces=25000/pods=100000/policies=75000/local=200"
	return suite{
		dir: "pkg/policy", pattern: "^BenchmarkCompile$/./pods=.*/./local=(50|200)$", benchtime: "3x",
		figures: []figure{
			{text: "ms, 1k policies, 5k pods", of: sample{small, nanoseconds}, scale: toMilliseconds, most: 40},
			{text: "ms, 10k policies, 250k pods", of: sample{large, nanoseconds}, scale: toMilliseconds, most: 3000},
			{text: "MB, 10k policies, 250k pods", of: sample{large, "peak-MB"}, most: 120},
			{text: "ms, 75k policies, 100k pods", of: sample{huge, nanoseconds}, scale: toMilliseconds, most: 3000},
			{text: "MB, 75k policies, 100k pods", of: sample{huge, "peak-MB"}, most: 300},
		},
	}
}

func labelSuite() suite {
	const few, many = "LabelFlip/pods=10000", "LabelFlip/pods=100000"
	return suite{
		dir: "pkg/policy", pattern: "^BenchmarkLabelFlip$", benchtime: "200000x",
		figures: []figure{
			{text: "us, 1k policies, 10k pods", of: sample{few, nanoseconds}, scale: toMicroseconds, most: 5, beside: []string{"members/op"}},
			{text: "x, with 10 times the pods", of: sample{many, nanoseconds}, by: sample{few, nanoseconds}, most: 1.2},
		},
	}
}

func setSuite() suite {
	s := suite{dir: "pkg/firewall", pattern: "^BenchmarkSetApply$", benchtime: "3s"}
	s.figures = append(s.figures, figure{text: "x the package netlink, 1 member", of: sample{"SetApply/members=1", "x-package"}, most: 1.2})
	for _, members := range []string{"1", "100", "10000"} {
		s.figures = append(s.figures, figure{
			text: "x messages by hand, " + members + " members", of: sample{"SetApply/members=" + members, "x-bare"}, most: 1.2,
			beside: []string{"ms/ours", "ms/bare", "x-bare-cpu"},
		})
	}
	return s
}

func ruleSuite() suite {
	s := suite{dir: "pkg/firewall", pattern: "^Benchmark(RuleApply|RewriteAll)$", benchtime: "20x"}
	for _, rules := range []string{"1000", "5000", "20000"} {
		s.figures = append(s.figures, figure{
			text: "x iptables-restore, " + rules + " rules", of: sample{"RuleApply/rules=" + rules, "x-bare"}, most: 1.15,
			beside: []string{"ms/ours", "ms/bare", "x-bare-cpu"},
		})
	}
	s.figures = append(
		s.figures,
		figure{
			text: "x, with 20 times the rules", of: sample{"RuleApply/rules=20000", "ms/ours"}, by: sample{"RuleApply/rules=1000", "ms/ours"}, most: 1.5,
		},
		figure{text: "x writing all, processor, 20000 rules", of: sample{"RewriteAll", "x-bare-cpu"}, most: 0.01, beside: []string{"ms/ours", "ms/bare"}},
	)
	return s
}

func eventSuite() suite {
	return suite{
		dir: "pkg/internal/bench", pattern: "^BenchmarkEvent$", benchtime: "5x",
		figures: []figure{
			{text: "x cheaper, a pod's label", of: sample{"Event/label", "x-rewrite"}, least: 100, beside: []string{"ms/event", "ms/rewrite"}},
			{text: "x cheaper, a policy's port", of: sample{"Event/policy", "x-rewrite"}, least: 10, beside: []string{"ms/event", "ms/rewrite"}},
		},
	}
}

func enforceSuite() suite {
	const one, two = "Enforce/nodes=1/policies=1000/pods=5000", "Enforce/nodes=2/policies=1000/pods=1000"
	return suite{
		dir: "pkg/internal/bench", pattern: "^BenchmarkEnforce$", benchtime: "200x", once: true,
		figures: []figure{
			{text: "ms, median, 1k policies, 5k pods", of: sample{one, "p50-ms"}, most: 15, beside: []string{"write-p50-ms", "rewrite-p50-ms"}},
			{text: "ms, 99 of 100", of: sample{one, "p99-ms"}, most: 100, beside: []string{"watch-p99-ms"}},
			{text: "x bare watch", of: sample{one, "x-watch"}, most: 2, beside: []string{"request-p50-ms", "watch-p50-ms", "restore-p50-ms"}},
			{text: "ms, 99 of 100, on both of two nodes", of: sample{two, "p99-ms"}, most: 1000, beside: []string{"p50-ms", "watch-p99-ms"}},
		},
	}
}

func firstSuite() suite {
	return suite{
		dir: "pkg/internal/bench", pattern: "^BenchmarkFirstPackets$", benchtime: "20x", once: true,
		figures: []figure{
			{text: "packets of isolated pods", of: sample{"FirstPackets", "forbidden-packets"}, most: 0, beside: []string{"control-packets"}},
			{text: "packets of other pods", of: sample{"FirstPackets", "control-packets"}, least: 20},
		},
	}
}

func revokeSuite() suite {
	s := suite{dir: "pkg/conntrack", pattern: "^BenchmarkRevoke$", benchtime: "50x", once: true}
	for _, connections := range []string{"100", "120000"} {
		s.figures = append(s.figures, figure{
			text: "ms, 99 of 100, among " + connections, of: sample{"Revoke/connections=" + connections, "p99-ms"}, most: 50, beside: []string{"p50-ms"},
		})
	}
	return s
}

func datapathSuite() suite {
	s := suite{dir: "pkg/internal/bench", pattern: "^BenchmarkDatapath$", benchtime: "15x", once: true}
	for _, traffic := range []struct {
		name  string
		least float64
	}{{"stream", 0.92}, {"packets", 0.78}, {"requests", 0.85}} {
		of := "Datapath/" + traffic.name
		s.figures = append(
			s.figures,
			figure{
				text: "x " + traffic.name + ", 100 on the pod", of: sample{of, "x-own-100"}, least: traffic.least,
				beside: []string{"cpu-x-own-100", "x-own-10", "x-own-1000", "cpu-x-own-1000"},
			},
			figure{text: "x " + traffic.name + ", 1000 on others", of: sample{of, "x-others"}, least: 0.97, beside: []string{"cpu-x-others"}},
		)
	}
	return s
}

func encryptionSuite() suite {
	s := suite{dir: "pkg/internal/bench", pattern: "^BenchmarkEncryption$", benchtime: "15x", once: true}
	for _, mtu := range []string{"auto", "1420", "8920"} {
		for _, path := range []string{"pods", "nodes"} {
			for _, flows := range []string{"1", "4"} {
				of := fmt.Sprintf("Encryption/mtu=%s/%s/flows=%s", mtu, path, flows)
				about := fmt.Sprintf(", %s to %s, %s flows, MTU %s", path, path, flows, mtu)
				s.figures = append(
					s.figures,
					figure{text: "x stream" + about, of: sample{of, "x-stream"}, least: 0.97, beside: []string{"stateful-x-stream", "bare-Gb/s"}},
					figure{text: "x processor" + about, of: sample{of, "x-cpu"}, most: 1.02, beside: []string{"stateful-x-cpu", "x-whole-cpu", "stateful-x-whole-cpu"}},
					figure{text: "x round trip" + about, of: sample{of, "x-trip"}, most: 1.05, beside: []string{"stateful-x-trip"}},
				)
			}
		}
	}
	return s
}

func churnSuite() suite {
	s := suite{dir: "pkg/kube", pattern: "^BenchmarkChurn$", benchtime: "20000x"}
	for _, encoding := range []string{"json", "vnd.kubernetes.protobuf"} {
		for _, kind := range []string{"irrelevant", "relevant"} {
			of := fmt.Sprintf("Churn/%s/%s/", encoding, kind)
			s.figures = append(s.figures, figure{
				text: "x decoding, " + encoding + ", " + kind, of: sample{of + "taken", nanoseconds}, by: sample{of + "decoded", nanoseconds}, most: 1.3,
			})
		}
	}
	return s
}

func restartSuite() suite {
	return suite{
		dir: "pkg/firewall", pattern: "^BenchmarkAdopt$", benchtime: "3x",
		figures: []figure{{
			text: "x saving, 20k rules, 200k members", of: sample{"Adopt", "x-bare"}, most: 1.5, beside: []string{"ms/ours", "ms/bare", "x-bare-cpu"},
		}},
	}
}

func meshSuite() suite {
	s := suite{dir: "pkg/wgdevice", pattern: "^BenchmarkMesh(First|Change|Memory)$", benchtime: "6x", once: true}
	for _, peers := range []string{"100", "1000", "5000"} {
		s.figures = append(s.figures, figure{
			text: "x setconf, first " + peers + " peers", of: sample{"MeshFirst/peers=" + peers, "x-setconf"}, most: 1.1,
			beside: []string{"x-setconf-cpu", "ms/peers", "ms/setconf", "x-setconf-routes", "x-setconf-routes-cpu"},
		})
	}
	const few, many = "MeshChange/peers=100", "MeshChange/peers=5000"
	for _, change := range []string{"join", "key", "leave"} {
		s.figures = append(s.figures, figure{
			text: "x at 5000 peers of at 100, " + change, of: sample{many, "ms/" + change}, by: sample{few, "ms/" + change}, most: 1.3,
			beside: []string{"ms/" + change, "ms/audit"},
		})
	}
	s.figures = append(
		s.figures,
		figure{text: "ms, a Node that concerns nobody", of: sample{many, "ms/unrelated"}, most: 0.01},
		figure{text: "KB of the tunnel, a peer", of: sample{"MeshMemory", "KB/peer"}, most: 27, beside: []string{"KB/bare-peer", "KB/daemon-peer"}},
		figure{text: "x bare, memory of the tunnel", of: sample{"MeshMemory", "KB/peer"}, by: sample{"MeshMemory", "KB/bare-peer"}, most: 1.1},
	)
	return s
}

func statusSuite() suite {
	return suite{
		dir: "pkg/internal/bench", pattern: "^BenchmarkStatus$", benchtime: "500x", once: true,
		figures: []figure{
			{text: "ms, 99 of 100, 250 leases", of: sample{"Status", "p99-ms"}, most: 20, beside: []string{"p50-ms", "cpu-ms"}},
			{text: "ms, 99 of 100, no address left", of: sample{"Status", "full-p99-ms"}, most: 20},
		},
	}
}

func leaseSuite() suite {
	s := suite{dir: "pkg/ipam", pattern: "^Benchmark(Choice|Lease|ReleaseNothing|NearlyFull|Replay)$", benchtime: "50x", once: true}
	for _, leased := range []string{"250", "65000"} {
		of := "Lease/leased=" + leased
		s.figures = append(
			s.figures,
			figure{text: "us, choosing an address among " + leased + ", in memory", of: sample{"Choice/leased=" + leased, "us/choice"}, most: 5},
			figure{
				text: "x bare system calls, a lease and its release among " + leased, of: sample{of, "x-bare"}, most: 3,
				beside: []string{"us/lease", "us/release", "us/bare", "x-host-local"},
			},
			figure{
				text: "ms, reading " + leased + " leases on all processors", of: sample{"Replay/leased=" + leased, "ms/replay-wall"}, most: 100,
				beside: []string{"ms/replay", "ms/bare", "ms/audit"},
			},
		)
	}
	s.figures = append(
		s.figures,
		figure{text: "x, with 260 times the leases", of: sample{"Lease/leased=65000", "us/lease"}, by: sample{"Lease/leased=250", "us/lease"}, most: 1.5},
		figure{text: "us, a lease in a /16 with one address free", of: sample{"NearlyFull/free=1", "us/lease"}, most: 5000},
	)
	return s
}

func joinSuite() suite {
	return suite{
		dir: "daemon", pattern: "^BenchmarkJoin$", benchtime: "5x", once: true,
		figures: []figure{{
			text: "x at 5000 nodes of at 100, join", of: sample{"Join/nodes=5000", "ms/join"}, by: sample{"Join/nodes=100", "ms/join"}, most: 1.3,
			beside: []string{"ms/join", "cpu-ms/join", "ms/key", "ms/leave", "ms/unrelated"},
		}},
	}
}
