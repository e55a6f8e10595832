package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/policy"
)

// explainName is the name of the command, whose exit status main makes.
const explainName = "explain"

// The errors that the output has told already.
var (
	// errDenied says that the connection that was asked about is denied, or one of them.
	errDenied = errors.New("denied")
	// errUnknown says that it cannot be told.
	errUnknown = errors.New("unknown")
)

// answer is what an explanation, or a verdict in it, comes to.
type answer string

// The answers.
const (
	allowed answer = "allowed"
	denied  answer = "denied"
	// partly is allowed to some and denied to others.
	partly answer = "partly"
	// unknown is what cannot be told: the kernel is not as planned, or a Service has no endpoint that is ready.
	unknown answer = "unknown"
)

// explanation is what `warrend explain` shows.
type explanation struct {
	agentapi.Explain

	// Node is the node whose daemon answered; empty without a daemon.
	Node string `json:"node,omitempty"`
	// Answer is that of all verdicts but those of endpoints that are not ready.
	Answer answer `json:"answer"`
	// Service is set where a Service was asked for.
	Service *serviceAnswer `json:"service,omitempty"`
	// Verdicts are one for each pair of addresses of one family and each number behind a port's name; of a Service for each
	// endpoint.
	Verdicts []judged `json:"verdicts"`
	// Notes say what one has to know to read the answer rightly.
	Notes []string `json:"notes,omitempty"`
	// Problems are those of the policies, pods and nodes that the verdicts name: what the kernel has may differ from what was
	// planned.
	Problems []agentapi.Problem `json:"problems"`
	// Drift is where the kernel of Node is not as planned, in the chains and sets that decide.
	Drift []firewall.Difference `json:"drift,omitempty"`
	// Unasked are the other nodes that enforce a part of the verdicts. What their kernels have is not known here.
	Unasked []unasked `json:"unasked,omitempty"`
}

// judged is one connection with what policies decide about it.
type judged struct {
	policy.Verdict

	// Answer is Allowed in a word, and unknown where the kernel is not as planned.
	Answer answer `json:"answer"`
	// ServicePort is the port of the Service that leads there; empty where no Service was asked for.
	ServicePort string `json:"servicePort,omitempty"`
	// NotReady is true for an endpoint that gets no connections at the moment.
	NotReady bool `json:"notReady,omitempty"`
}

// serviceAnswer is the answer for a Service, by its ports.
type serviceAnswer struct {
	Name       string       `json:"name"`
	ClusterIPs []netip.Addr `json:"clusterIPs,omitempty"`
	Ports      []portAnswer `json:"ports"`
}

// portAnswer counts the endpoints of a port that are ready, those of them that are reached, and those of which it is not known.
type portAnswer struct {
	Port      string `json:"port"`
	Endpoints int    `json:"endpoints"`
	Allowed   int    `json:"allowed"`
	Unknown   int    `json:"unknown"`
}

// The help of the command.
const (
	explainLong = `Tell whether policies allow a connection, and which of their rules decide: the egress policies of its source and the
ingress policies of its destination, rule by rule, and the node that enforces them.

A Service, by name or by its address, is answered for each of its endpoints, because policies judge a connection after it was
translated to one of them; without --port for all its ports.

It asks the daemon of this node, which knows the pods and policies of all nodes, and says where its own kernel is not as
planned. With --objects it reads a directory instead, and addresses of pods come from their status.

The exit status is 0 when the connection is allowed (to all endpoints of a Service that are ready), 1 when it is denied (to
one of them), and 2 when that cannot be told.`

	explainExamples = `  # Does the web pod reach the api pod? By the number of the container's port, or by its name:
  warrend explain --from shop/web --to shop/api --port 8080
  warrend explain --from shop/web --to shop/api --port http

  # Does it reach every endpoint of a Service, on one of its ports, or on all?
  warrend explain --from shop/web --to svc/shop/api --port 80
  warrend explain --from shop/web --to svc/shop/api

  # Who from outside reaches it, and what outside does it reach?
  warrend explain --from 203.0.113.9 --to shop/web --port 443
  warrend explain --from shop/web --to 192.0.2.7 --port 53/udp

  # What would policies do that are not applied yet?
  warrend explain --from shop/web --to shop/api --port http --objects ./objects

  # For programs:
  warrend explain --from shop/web --to svc/shop/api -o json | jq .answer`
)

// explainCommand tells what the policies decide about a connection.
func explainCommand() *cobra.Command {
	var p paths
	var q agentapi.Explain
	var objects, output string
	cmd := &cobra.Command{
		Use:     explainName + " --from NAMESPACE/POD|IP --to NAMESPACE/POD|svc/NAMESPACE/NAME|IP [--port PORT]",
		Short:   "Tell whether policies allow a connection, and which of their rules decide",
		Long:    explainLong,
		Example: explainExamples,
		Args:    cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if q.From == "" || q.To == "" {
				return errors.New("explain needs --from and --to, each a NAMESPACE/POD or an address, or svc/NAMESPACE/NAME as --to")
			}
			if output != "text" && output != "json" {
				return fmt.Errorf("-o %s: say text or json", output)
			}
			ask := func() (explanation, error) { return askDaemon(cmd.Context(), p.socket(), q) }
			if objects != "" {
				ask = func() (explanation, error) { return askObjects(cmd.Context(), objects, q) }
			}
			e, err := ask()
			if err != nil {
				return err
			}
			if err = printExplanation(cmd.OutOrStdout(), e, output); err != nil {
				return err
			}
			return e.Answer.status()
		},
	}
	p.add(cmd.Flags())
	cmd.Flags().StringVar(&q.From, "from", "", "source: NAMESPACE/POD or an address (required)")
	cmd.Flags().StringVar(&q.To, "to", "", "destination: NAMESPACE/POD, svc/NAMESPACE/NAME or an address (required)")
	cmd.Flags().StringVar(&q.Port, "port", "", "port of the destination: 80, 53/udp, or the name of a container's or a Service's port; without it ICMP, which only rules without ports allow, or all ports of a Service")
	cmd.Flags().StringVar(&objects, "objects", "", "read Node, Namespace, Pod, Service and NetworkPolicy YAML from this directory instead of asking the daemon")
	cmd.Flags().StringVarP(&output, "output", "o", "text", "text or json")
	return cmd
}

// askDaemon asks the daemon of this node.
func askDaemon(ctx context.Context, socket string, q agentapi.Explain) (explanation, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	response, err := agentapi.Call(ctx, socket, agentapi.Request{Op: agentapi.OpExplain, Explain: &q})
	if refusal, ok := errors.AsType[*agentapi.Error](err); ok {
		return explanation{}, refusal
	}
	if err != nil {
		return explanation{}, fmt.Errorf("asking warrend at %s (does it run on this node? --objects DIR needs none): %w", socket, err)
	}
	var e explanation
	if err = json.Unmarshal(response.Explanation, &e); err != nil {
		return explanation{}, fmt.Errorf("reading the answer of warrend at %s: %w", socket, err)
	}
	return e, nil
}

// askObjects answers from a directory of objects, for a cluster with encryption on.
func askObjects(ctx context.Context, dir string, q agentapi.Explain) (explanation, error) {
	objects, err := kube.ReadDirectory(dir, "")
	if err != nil {
		return explanation{}, err
	}
	f := facts{encrypted: true}
	f.snapshot, f.problems = objects.Snapshot()
	if err = f.lookUp(ctx, objects, q.To); err != nil {
		return explanation{}, err
	}
	if address, ok := strangerAt(f.snapshot, q.To); ok && f.service == nil {
		f.notes = append(f.notes, fmt.Sprintf("if %s is the address of a Service, put that into the directory: %s", address, translated))
	}
	e, err := explain(f, q)
	if err != nil {
		return explanation{}, err
	}
	e.settle()
	return e, nil
}

// explainPatience is how long the daemon takes for a question: the server is asked for Services, and the kernel for what it has.
const explainPatience = 8 * time.Second

// explain answers the operator's question from what was planned last. It waits for no step that runs.
func (n *node) explain(ctx context.Context, q agentapi.Explain) agentapi.Response {
	ctx, cancel := context.WithTimeout(ctx, explainPatience)
	defer cancel()
	o := n.outcomeNow()
	if !o.synced {
		return refuse(types.ErrTryAgainLater, errNotReady(o))
	}
	f := facts{snapshot: n.planner.snapshot(), problems: o.problems, encrypted: n.options.encryptionMode}
	if err := f.lookUp(ctx, n.source, q.To); err != nil {
		return refuse(types.ErrTryAgainLater, err)
	}
	e, err := explain(f, q)
	if err != nil {
		return refuse(types.ErrDecodingFailure, err)
	}
	e.Node = n.options.nodeName
	e.close(o.closed)
	e.compare(ctx, kernel{comparer: n.filter, wanted: n.planner.ruleset, closed: o.closed})
	e.askOthers(f.snapshot)
	e.settle()
	text, err := json.Marshal(e)
	if err != nil {
		return refuse(types.ErrInternal, fmt.Errorf("writing the explanation: %w", err))
	}
	return agentapi.Response{Explanation: text}
}

// explain answers a question by the policies alone. It is pure.
func explain(f facts, q agentapi.Explain) (explanation, error) {
	connections, err := connectionsOf(f, q)
	if err != nil {
		return explanation{}, err
	}
	e := explanation{Explain: q, Notes: f.notes, Problems: []agentapi.Problem{}}
	for _, c := range connections {
		v := judged{Verdict: policy.Explain(f.snapshot, c.Flow), NotReady: c.notReady}
		if c.port != nil {
			v.ServicePort = servicePortText(*c.port)
			e.Notes = append(e.Notes, blindBlocks(f, c, v.Verdict)...)
		}
		e.Verdicts = append(e.Verdicts, v)
	}
	if f.service != nil {
		e.Service = &serviceAnswer{Name: f.service.Key().String(), ClusterIPs: f.service.ClusterIPs}
	}
	e.Notes = unique(append(e.Notes, e.hints()...))
	named := e.objects()
	for _, p := range f.problems {
		if concerns(p, named) {
			e.Problems = append(e.Problems, agentapi.Problem(p))
		}
	}
	return e, nil
}

// hints say what a question leaves out.
func (e *explanation) hints() []string {
	var hints []string
	if e.Service != nil && e.Verdicts[0].From == (policy.End{}) {
		hints = append(hints, "the node that takes in a connection from outside puts its own address in the place of the source where it sends it on "+
			"to another node, unless the Service has externalTrafficPolicy: Local")
	}
	if slices.ContainsFunc(e.Verdicts, stoppedByPorts) {
		hints = append(hints, "without --port this asks about ICMP, which a rule with ports never matches; --port asks about a connection")
	}
	return hints
}

// stoppedByPorts tells whether ICMP is denied by the ports of a rule alone.
func stoppedByPorts(v judged) bool {
	matches := func(m policy.Match) bool { return m.Matches }
	return v.Flow.Protocol == policy.ICMP && slices.ContainsFunc([]policy.Side{v.Egress, v.Ingress}, func(side policy.Side) bool {
		return !side.Allowed && slices.ContainsFunc(side.Policies, func(p policy.Policy) bool {
			return slices.ContainsFunc(p.Rules, func(r policy.Rule) bool { return slices.ContainsFunc(r.Peers, matches) })
		})
	})
}

// unique leaves out what was said before.
func unique(texts []string) []string {
	var kept []string
	for _, text := range texts {
		if !slices.Contains(kept, text) {
			kept = append(kept, text)
		}
	}
	return kept
}

// objects are the objects that the verdicts rest on, named as in problems.
func (e *explanation) objects() map[string]bool {
	named := map[string]bool{}
	for _, v := range e.Verdicts {
		for _, end := range []policy.End{v.From, v.To} {
			namespace, _, _ := strings.Cut(end.Pod, "/")
			named["Pod "+end.Pod], named["Node "+end.Node], named["Namespace "+namespace] = true, true, true
		}
		for _, p := range slices.Concat(v.Egress.Policies, v.Ingress.Policies) {
			named["NetworkPolicy "+p.Name] = true
		}
	}
	return named
}

// concerns tells whether a problem may make the kernel differ from a verdict: one of the named objects, or of something
// else than an object, such as a file that may hold a policy.
func concerns(p cluster.Problem, named map[string]bool) bool {
	kind, names, _ := strings.Cut(p.Object, " ")
	switch kind {
	case "NetworkPolicy", "Namespace", "Node", "Pod":
		return slices.ContainsFunc(strings.Split(names, ", "), func(name string) bool { return named[kind+" "+name] })
	default:
		return true
	}
}
