package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/warren-cni/warren/pkg/cluster"
)

// serverPatience bounds the question where the API server is.
const serverPatience = 2 * time.Second

// errCutOff says that the guards would cut the node off.
var errCutOff = errors.New("the guards would cut the node off, so nothing is applied")

// cutOff returns a problem, and its error, where the guards would cut the node off from the API server: because the cluster CIDR holds the
// node's own address or the server's, or perhaps holds the latter, which is not known. Nothing is applied then, and so nothing opens.
func (n *node) cutOff(ctx context.Context, self cluster.Node) (cluster.Problem, error) {
	if !n.options.encryptionMode || len(n.options.parsedCluster) == 0 {
		return cluster.Problem{}, nil
	}
	const remedy = "set --cluster-cidr to the pods' network, which holds no node"
	object := "Node " + n.options.nodeName
	if prefix, a, found := heldBy(n.options.parsedCluster, self.Addresses); found {
		err := fmt.Errorf("the cluster CIDR %s holds %s, the node's own InternalIP: %w", prefix, a, errCutOff)
		return applyProblem("ClusterCIDRHoldsNode", object, err, remedy), err
	}
	if !n.serversKnown {
		within, cancel := context.WithTimeout(ctx, serverPatience)
		defer cancel()
		var err error
		n.servers, err = n.source.Servers(within)
		if err != nil {
			// Where they have stood while the server answered they do not cut it off; it is asked again.
			if stood, stoodErr := n.guardsStood(); stoodErr == nil && stood {
				return cluster.Problem{}, nil
			}
			err = fmt.Errorf("whether the cluster CIDR holds the API server: %w", err)
			return applyProblem("APIServerUnknown", object, err,
				"see that the node resolves the API server's name and reaches it; nothing is applied until then, the daemon retries"), err
		}
		n.serversKnown = true
	}
	if prefix, a, found := heldBy(n.options.parsedCluster, n.servers); found {
		err := fmt.Errorf("the cluster CIDR %s holds %s, where the API server is: %w", prefix, a, errCutOff)
		return applyProblem("ClusterCIDRHoldsServer", object, err, remedy), err
	}
	return cluster.Problem{}, nil
}

// heldBy returns the first of the addresses that a prefix holds.
func heldBy(prefixes []netip.Prefix, addresses []netip.Addr) (netip.Prefix, netip.Addr, bool) {
	for _, p := range prefixes {
		if at := slices.IndexFunc(addresses, p.Contains); at >= 0 {
			return p, addresses[at], true
		}
	}
	return netip.Prefix{}, netip.Addr{}, false
}

// guardedFile names, in the state directory, the cluster CIDRs whose guards have stood on this node while the API server answered: these do
// not cut it off, so that after a boot they may be put up before it answers.
const guardedFile = "guarded-cluster-cidr"

// rememberGuards writes down that the guards stand.
func (n *node) rememberGuards() error {
	if !n.options.encryptionMode || len(n.options.parsedCluster) == 0 {
		return nil
	}
	if stood, err := n.guardsStood(); err != nil || stood {
		return err
	}
	// One that is cut short by a crash is not equal, and the next step writes it again.
	if err := os.WriteFile(filepath.Join(n.options.stateDir, guardedFile), []byte(n.guardedText()), 0o600); err != nil {
		return fmt.Errorf("writing down that the guards stand: %w", err)
	}
	return nil
}

// guardsStood says whether guards of these cluster CIDRs have stood on this node.
func (n *node) guardsStood() (bool, error) {
	text, err := os.ReadFile(filepath.Join(n.options.stateDir, guardedFile))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, fmt.Errorf("reading whether the guards have stood: %w", err)
	}
	return string(text) == n.guardedText(), nil
}

func (n *node) guardedText() string {
	var text strings.Builder
	for _, p := range n.options.parsedCluster {
		fmt.Fprintln(&text, p)
	}
	return text.String()
}
