// Command warren is the CNI plugin: it gives a pod its addresses and its link to the node, and returns when the node's
// daemon has put the pod's policies into the kernel and opened the start gate for it.
//
// It does not link Kubernetes' packages, because it is started for every pod. Nothing but the result is written
// to its standard output.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/gate"
	"github.com/warren-cni/warren/pkg/ipam"
	_ "github.com/warren-cni/warren/plugin/single"
)

// daemonTimeout bounds what the daemon may take for one request. It waits itself for no longer than 5 s for a pod that it does
// not know yet.
const daemonTimeout = 30 * time.Second

// version is set by the build.
var version = "dev"

func main() {
	// Without it skel fails a DEL that is done, and each one after it, where the path of the pod's network namespace leads to the node's by
	// now: /proc/PID/ns/net of a runtime, once another process has the number. ADD looks at the path itself, before it does anything.
	_ = os.Setenv("CNI_NETNS_OVERRIDE", "1")
	skel.PluginMainFuncs(skel.CNIFuncs{
		Add: coded(add), Del: coded(del), Check: coded(check), GC: coded(collect), Status: coded(status),
	}, cniversion.PluginSupports("0.4.0", "1.0.0", "1.1.0"), "CNI plugin warren "+version)
}

// coded gives a command's error its CNI error code, and keeps all of its text.
func coded(command func(context.Context, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) error {
		ctx, cancel := context.WithTimeout(context.Background(), daemonTimeout)
		defer cancel()
		if err := command(ctx, args); err != nil {
			return types.NewError(codeOf(err), err.Error(), "")
		}
		return nil
	}
}

// codeOf returns the CNI error code (section "Error" of the CNI specification) for an error.
func codeOf(err error) uint {
	var named *types.Error
	var refused *agentapi.Error
	var exhausted *ipam.ExhaustedError
	switch {
	case errors.As(err, &named):
		return named.Code
	case errors.As(err, &refused):
		return refused.Code
	case errors.As(err, &exhausted), errors.Is(err, gate.ErrMissing), errors.Is(err, ipam.ErrBusy):
		return types.ErrTryAgainLater
	default:
		return types.ErrInternal
	}
}

// ask sends a request to the daemon. That it is away, or of another version, is an error that passes.
func (c *config) ask(ctx context.Context, request agentapi.Request) (*agentapi.Response, error) {
	response, err := agentapi.Call(ctx, filepath.Join(c.RunDir, "warrend.sock"), request)
	var refused *agentapi.Error
	var differs *agentapi.VersionError
	switch {
	case err == nil:
		return response, nil
	case errors.As(err, &refused):
		return nil, fmt.Errorf("the daemon of this node refuses: %w", err)
	case errors.As(err, &differs):
		return nil, types.NewError(types.ErrTryAgainLater, err.Error(), "")
	default:
		return nil, types.NewError(types.ErrTryAgainLater, fmt.Sprintf("the daemon of this node does not answer: %v", err), "")
	}
}

// leases opens the store of the node's leases.
func (c *config) leases() (*ipam.Store, error) {
	return ipam.Open(filepath.Join(c.RunDir, "ipam"))
}
