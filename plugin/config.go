package main

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"path/filepath"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/cni/pkg/types/create"

	"github.com/warren-cni/warren/pkg/ipam"
)

// The MTU of a pod's link. IPv6 does not work below 1280 (RFC 8200, section 5), IPv4 hosts accept at least 576 (RFC 791).
const (
	minMTU   = 576
	minMTUv6 = 1280
	maxMTU   = 65535
)

// config is the plugin's entry of the conflist, as the daemon wrote it and libcni completed it.
type config struct {
	CNIVersion string   `json:"cniVersion"`
	RunDir     string   `json:"runDir"`
	Ranges     []string `json:"ranges"`
	MTU        int      `json:"mtu"`
	// PrevResult is only parsed where it is used, so that a bad one cannot keep a DEL from succeeding.
	PrevResult json.RawMessage `json:"prevResult"`
	// ValidAttachments is nil where the key is missing, which is not the same as an empty list.
	ValidAttachments *[]types.GCAttachment `json:"cni.dev/valid-attachments"`
}

// parseConfig reads what every command needs.
func parseConfig(data []byte) (*config, error) {
	c := &config{}
	if err := json.Unmarshal(data, c); err != nil {
		return nil, invalid("reading the configuration: %v", err)
	}
	if !filepath.IsAbs(c.RunDir) {
		return nil, invalid("runDir %q is not an absolute path", c.RunDir)
	}
	return c, nil
}

// ranges returns what addresses are leased from, and checks all that a pod's link is made of.
func (c *config) ranges() ([]netip.Prefix, error) {
	if len(c.Ranges) == 0 {
		return nil, invalid("ranges is empty: the node has no podCIDR")
	}
	var prefixes []netip.Prefix
	least := minMTU
	for i, text := range c.Ranges {
		p, err := netip.ParsePrefix(text)
		if err != nil || p != p.Masked() || p.Addr().Is4In6() {
			return nil, invalid("ranges[%d]: %q is not a network like 10.244.1.0/24 or fd00:10:244:1::/64", i, text)
		}
		for _, other := range prefixes {
			if other.Addr().Is4() == p.Addr().Is4() {
				return nil, invalid("ranges[%d]: %s is of the same IP family as %s; a pod has at most one address of each", i, p, other)
			}
		}
		if p.Addr().Is6() {
			least = minMTUv6
		}
		prefixes = append(prefixes, p)
	}
	if c.MTU < least || c.MTU > maxMTU {
		return nil, invalid("mtu: %d is not between %d and %d", c.MTU, least, maxMTU)
	}
	return prefixes, nil
}

// previous returns the result of the plugins before in the chain, or for CHECK of the whole chain's ADD; nil without one.
func (c *config) previous() (*current.Result, error) {
	if len(c.PrevResult) == 0 || string(c.PrevResult) == "null" {
		return nil, nil
	}
	parsed, err := create.Create(c.CNIVersion, c.PrevResult)
	if err != nil {
		return nil, invalid("prevResult: %v", err)
	}
	result, err := current.NewResultFromResult(parsed)
	if err != nil {
		return nil, invalid("prevResult: %v", err)
	}
	return result, nil
}

// invalid is the error for a configuration that cannot be used.
func invalid(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(format, args...), "")
}

// parseOwner returns who asks, from the environment. A container that is no pod is refused: it would have no identity that a
// policy could name.
func parseOwner(args *skel.CmdArgs) (ipam.Owner, error) {
	var pod struct {
		types.CommonArgs
		K8S_POD_NAMESPACE          types.UnmarshallableString //nolint:staticcheck // LoadArgs finds fields by these names
		K8S_POD_NAME               types.UnmarshallableString //nolint:staticcheck // see above
		K8S_POD_UID                types.UnmarshallableString //nolint:staticcheck // see above
		K8S_POD_INFRA_CONTAINER_ID types.UnmarshallableString //nolint:staticcheck // see above
	}
	if err := types.LoadArgs(args.Args, &pod); err != nil {
		return ipam.Owner{}, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_ARGS: %v", err), "")
	}
	if pod.K8S_POD_NAMESPACE == "" || pod.K8S_POD_NAME == "" {
		return ipam.Owner{}, types.NewError(types.ErrInvalidEnvironmentVariables,
			"CNI_ARGS: K8S_POD_NAMESPACE or K8S_POD_NAME is missing: only a pod can be attached, because policies need its identity", "")
	}
	return ipam.Owner{
		ContainerID: args.ContainerID, Interface: args.IfName, Netns: args.Netns,
		Namespace: string(pod.K8S_POD_NAMESPACE), Name: string(pod.K8S_POD_NAME), UID: string(pod.K8S_POD_UID),
	}, nil
}
