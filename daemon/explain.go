package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/pkg/types"
	"github.com/spf13/cobra"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
)

// explainName is the name of the command, whose exit status main makes.
const explainName = "explain"

// errDenied says that the connection that was asked about is denied.
var errDenied = errors.New("denied")

// explanation is what `warrend explain` shows.
type explanation struct {
	agentapi.Explain

	// Node is the node whose daemon answered; empty without a daemon.
	Node string `json:"node,omitempty"`
	// Allowed is true when every verdict is.
	Allowed bool `json:"allowed"`
	// Verdicts are one for each pair of addresses of one family and each number behind a port's name.
	Verdicts []policy.Verdict `json:"verdicts"`
	// Problems are those of the policies, pods and nodes that the verdicts name: what the kernel has may differ from what was
	// planned.
	Problems []agentapi.Problem `json:"problems"`
}

// explainCommand tells what the policies decide about a connection.
func explainCommand() *cobra.Command {
	var p paths
	var q agentapi.Explain
	var objects, output string
	cmd := &cobra.Command{
		Use:   explainName + " --from NAMESPACE/POD|IP --to NAMESPACE/POD|IP [--port PORT]",
		Short: "Tell whether policies allow a connection, and which of their rules decide",
		Long: `Tell whether policies allow a connection, and which of their rules decide: the egress policies of its source and the
ingress policies of its destination, rule by rule, and the node that enforces them.

It asks the daemon of this node, which knows the pods and policies of all nodes. With --objects it reads a directory
instead, and addresses of pods come from their status.

The exit status is 0 when the connection is allowed, 1 when it is denied, 2 when that cannot be told.`,
		Example: `  warrend explain --from shop/web --to shop/api --port 8080
  warrend explain --from shop/web --to 192.0.2.7 --port 53/udp
  warrend explain --from shop/web --to shop/api --port http --objects ./objects`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if q.From == "" || q.To == "" {
				return errors.New("explain needs --from and --to, each a NAMESPACE/POD or an address")
			}
			if output != "text" && output != "json" {
				return fmt.Errorf("-o %s: say text or json", output)
			}
			ask := func() (explanation, error) { return askDaemon(cmd.Context(), p.socket(), q) }
			if objects != "" {
				ask = func() (explanation, error) { return askObjects(objects, q) }
			}
			e, err := ask()
			if err != nil {
				return err
			}
			if err = printExplanation(cmd.OutOrStdout(), e, output); err == nil && !e.Allowed {
				return errDenied
			}
			return err
		},
	}
	p.add(cmd.Flags())
	cmd.Flags().StringVar(&q.From, "from", "", "source: NAMESPACE/POD or an address (required)")
	cmd.Flags().StringVar(&q.To, "to", "", "destination: NAMESPACE/POD or an address (required)")
	cmd.Flags().StringVar(&q.Port, "port", "", "port of the destination: 80, 53/udp, or a container port's name; without it ICMP, which only rules without ports allow")
	cmd.Flags().StringVar(&objects, "objects", "", "read Node, Namespace, Pod and NetworkPolicy YAML from this directory instead of asking the daemon")
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
func askObjects(dir string, q agentapi.Explain) (explanation, error) {
	snapshot, problems, err := kube.Load(dir, "")
	if err != nil {
		return explanation{}, err
	}
	return explain(snapshot, problems, q, true)
}

// explain answers the operator's question from what the last step planned.
func (n *node) explain(q agentapi.Explain) agentapi.Response {
	o := n.outcomeNow()
	if !o.synced {
		return refuse(types.ErrTryAgainLater, errNotReady(o))
	}
	e, err := explain(o.plan.snapshot, o.problems, q, n.options.encryptionMode)
	if err != nil {
		return refuse(types.ErrDecodingFailure, err)
	}
	e.Node = n.options.nodeName
	e.close(o.closed)
	text, err := json.Marshal(e)
	if err != nil {
		return refuse(types.ErrInternal, fmt.Errorf("writing the explanation: %w", err))
	}
	return agentapi.Response{Explanation: text}
}

// explain answers a question from a snapshot. It is pure.
func explain(s cluster.Snapshot, problems []cluster.Problem, q agentapi.Explain, encrypted bool) (explanation, error) {
	flows, err := flowsOf(s, q, encrypted)
	if err != nil {
		return explanation{}, err
	}
	e := explanation{Explain: q, Allowed: true, Problems: []agentapi.Problem{}}
	for _, f := range flows {
		v := policy.Explain(s, f)
		e.Verdicts = append(e.Verdicts, v)
		e.Allowed = e.Allowed && v.Allowed
	}
	named := e.objects()
	for _, p := range problems {
		if concerns(p, named) {
			e.Problems = append(e.Problems, agentapi.Problem(p))
		}
	}
	return e, nil
}

// close takes back what rules allow that the kernel of the daemon's own node has refused: it drops in their place.
func (e *explanation) close(closed []firewall.ClosedChain) {
	for i := range e.Verdicts {
		v := &e.Verdicts[i]
		for _, side := range []*policy.Side{&v.Egress, &v.Ingress} {
			isSide := func(c firewall.ClosedChain) bool {
				return c.Name == side.Chain && c.Family == netfilter.FamilyOf(v.Flow.Dst)
			}
			if side.Node != e.Node || !side.Allowed || !slices.ContainsFunc(closed, isSide) {
				continue
			}
			side.Allowed, v.Allowed, e.Allowed = false, false, false
			side.Because = "the kernel has chain " + side.Chain + " closed, because it refused these rules"
		}
	}
}

// objects are the objects that the verdicts rest on, named as in problems.
func (e explanation) objects() map[string]bool {
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
