package main

import (
	"context"
	"fmt"

	"github.com/warren-cni/warren/pkg/guard"
	"github.com/warren-cni/warren/pkg/mesh"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/policy"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// early puts the guards up before anything is known of the cluster, on a node where no rule of ours stands, and where they have stood
// before: one that has just booted. What the node's own programs send to pods would else take the default route, in clear, until the
// API server has answered. Where rules stand it changes none of them: they know more than this does.
func (n *node) early(ctx context.Context) error {
	o := n.options
	if !o.encryptionMode || len(o.parsedCluster) == 0 {
		return nil
	}
	if stood, err := n.guardsStood(); err != nil || !stood {
		return err // they might cut the node off; see cutOff
	}
	bare, err := n.filter.Bare(ctx)
	if err != nil || !bare {
		return err
	}
	guards := guard.Compile(o.guards(mesh.Config{}))
	nobody := policy.NewCompiler(o.nodeName, policy.Options{Log: o.logMode}).Ruleset() // the guards jump to its chains
	_, err = n.filter.Apply(ctx, netfilter.Merge(guards, nobody))
	if err != nil {
		return fmt.Errorf("putting up the guards: %w", err)
	}
	n.log.Info("guards stand before the cluster is known", "cluster_cidrs", o.parsedCluster)
	return wgdevice.Reserve(o.parsedCluster)
}
