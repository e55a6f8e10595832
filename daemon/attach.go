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

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
)

// attachPatience is how long an attach waits for its pod to become known before the runtime is told to come again.
const attachPatience = 5 * time.Second

// attachPause is how long an attach waits before it tries again, unless something changes before.
const attachPause = 500 * time.Millisecond

// handle answers one request of the plugin or of the operator's command.
func (n *node) handle(ctx context.Context, request agentapi.Request) agentapi.Response {
	switch request.Op {
	case agentapi.OpAttach, agentapi.OpCheck:
		if request.Pod == nil || len(request.Pod.Addresses) == 0 {
			return refuse(types.ErrDecodingFailure, errors.New("the request names no pod or no address"))
		}
		if request.Op == agentapi.OpAttach {
			return n.attach(ctx, *request.Pod)
		}
		return n.check(ctx, *request.Pod)
	case agentapi.OpReady:
		return canAttach(n.outcomeNow())
	case agentapi.OpReleased:
		n.trash.released()
		return agentapi.Response{}
	case agentapi.OpRemoveChained:
		if err := n.collector.removeChained(ctx, request.Containers...); err != nil {
			return refuse(types.ErrInternal, err)
		}
		return agentapi.Response{}
	case agentapi.OpStatus:
		text, err := json.Marshal(n.status(ctx))
		if err != nil {
			return refuse(types.ErrInternal, fmt.Errorf("writing the status: %w", err))
		}
		return agentapi.Response{Status: text}
	case agentapi.OpExplain:
		if request.Explain == nil {
			return refuse(types.ErrDecodingFailure, errors.New("the request names no connection"))
		}
		return n.explain(ctx, *request.Explain)
	case agentapi.OpVerify:
		return n.verify(ctx)
	case agentapi.OpRotate:
		if request.Rotate == nil {
			return refuse(types.ErrDecodingFailure, errors.New("the request does not say what to do with the key"))
		}
		return n.keys.handle(*request.Rotate)
	default:
		return refuse(types.ErrDecodingFailure, fmt.Errorf("unknown operation %q", request.Op))
	}
}

// canAttach says whether pods can be attached: not before the node is ready, and not where policies would not hold.
func canAttach(o outcome) agentapi.Response {
	if !o.ready {
		return refuse(types.ErrTryAgainLater, errNotReady(o))
	}
	at := slices.IndexFunc(o.problems, func(p cluster.Problem) bool { return p.Code == ipvsCode })
	if at >= 0 {
		return refuse(types.ErrLimitedConnectivity, errors.New(o.problems[at].String()))
	}
	return agentapi.Response{Limited: limited(o.problems)}
}

// limits are the problems with which the pods that run lack something that each of them should have: the protection of their
// policies, the way to other nodes, or any way at all. What concerns one policy or one peer is none of them: otherwise whoever may
// write a policy could make a node NotReady.
var limits = []string{"FirewallApplyFailed", "ClusterCIDRHoldsNode", "ClusterCIDRHoldsServer", "NoTunnel", "MeshApplyFailed", "ForwardingOff"} //nolint:gochecknoglobals // a constant list

// limited says what pods that run lack, and is empty where nothing does.
func limited(problems []cluster.Problem) string {
	var lacks []string
	for _, p := range problems {
		if slices.Contains(limits, p.Code) {
			lacks = append(lacks, p.String())
		}
	}
	return strings.Join(lacks, "; ")
}

// attach puts a pod's policies into the kernel and opens the start gate for it; it succeeds only when both were seen
// done. Everything else is "try again later": the runtime retries, and the pod stays closed.
func (n *node) attach(ctx context.Context, pod agentapi.Pod) agentapi.Response {
	ctx, cancel := context.WithTimeout(ctx, attachPatience)
	defer cancel()
	asked := n.clock()
	if o := n.outcomeNow(); !o.ready {
		return refuse(types.ErrTryAgainLater, errNotReady(o))
	}
	unknown := errors.New("it was not asked for yet")
	for {
		// The watch may be behind, so the gate opens for nobody before the pod and its policies were read as they are now.
		if unknown != nil {
			unknown = n.source.Refresh(ctx, pod.Namespace, pod.Name, pod.UID)
		}
		if unknown == nil {
			n.ask(cluster.Holder{ContainerID: pod.ContainerID, Interface: pod.Interface})
			err := n.loop.Sync(ctx)
			if ctx.Err() == nil && n.isOpen(pod) { // an error may be the mesh's, which opens nothing
				return agentapi.Response{}
			}
			if err != nil && ctx.Err() == nil {
				return refuse(types.ErrTryAgainLater, fmt.Errorf("programming pod %s/%s: %w", pod.Namespace, pod.Name, err))
			}
		}
		select {
		case <-n.nextStep():
		case <-time.After(attachPause):
		case <-ctx.Done():
			err := fmt.Errorf("pod %s/%s (uid %s) is not known to the daemon, or its policies are not in the kernel, after %v",
				pod.Namespace, pod.Name, pod.UID, n.clock().Sub(asked).Round(time.Millisecond))
			return refuse(types.ErrTryAgainLater, errors.Join(err, unknown))
		}
	}
}

// isOpen says whether the last step opened the gate for all of the pod's addresses, and for this pod: who had an address
// before does not count.
func (n *node) isOpen(pod agentapi.Pod) bool {
	o := n.outcomeNow()
	for _, address := range pod.Addresses {
		if o.open[address] != (cluster.Holder{ContainerID: pod.ContainerID, Interface: pod.Interface}) {
			return false
		}
	}
	return true
}

// errNotReady says why pods cannot be attached yet.
func errNotReady(o outcome) error {
	if !o.synced {
		return errors.New("warrend has not read the cluster's objects yet")
	}
	if len(o.problems) > 0 {
		return fmt.Errorf("warrend is not ready: %s", o.problems[0])
	}
	return errors.New("warrend is not ready: policy and mesh are being applied for the first time")
}

// refuse makes an error response.
func refuse(code uint, err error) agentapi.Response {
	return agentapi.Response{Error: &agentapi.Error{Code: code, Message: err.Error()}}
}
