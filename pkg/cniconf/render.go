// Package cniconf writes what the container runtime reads: the conflist that makes Warren the node's network, and the
// plugin binaries beside it.
//
// Files appear atomically and only with whole content. The conflist may hold entries of other programs (a service mesh
// appends its own plugin): they survive every rewrite, in their order.
package cniconf

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
)

// FileName is the conflist's name in the CNI configuration directory.
const FileName = "10-warren.conflist"

// NetworkName is the conflist's name; runtimes cache results under it, so it must not change.
const NetworkName = "warren"

// pluginType is the type of our entry, and the name of its binary.
const pluginType = "warren"

// The spec versions: 1.0.0 because containerd 1.6 refuses a newer one, and a list for runtimes that choose.
const cniVersion = "1.0.0"

// Params is what the plugin needs to know.
type Params struct {
	RunDir string
	// Ranges are the node's podCIDRs.
	Ranges []netip.Prefix
	MTU    int
}

// plugin is one entry of the conflist that is ours.
type plugin struct {
	Type         string          `json:"type"`
	RunDir       string          `json:"runDir,omitempty"`
	Ranges       []netip.Prefix  `json:"ranges,omitempty"`
	MTU          int             `json:"mtu,omitempty"`
	SNAT         bool            `json:"snat,omitempty"`
	Capabilities map[string]bool `json:"capabilities,omitempty"`
}

// own returns our entries in their order.
func own(p Params) []plugin {
	return []plugin{
		{Type: pluginType, RunDir: p.RunDir, Ranges: p.Ranges, MTU: p.MTU},
		{Type: "portmap", SNAT: true, Capabilities: map[string]bool{"portMappings": true}},
		{Type: "bandwidth", Capabilities: map[string]bool{"bandwidth": true}},
	}
}

// Render returns the conflist. existing is the file as it stands, or nil: our entries are replaced where they are, entries
// and keys of others stay as they are. An existing file that is not a conflist is an error, so that nothing of
// another program is lost silently.
func Render(existing []byte, p Params) ([]byte, error) {
	list := map[string]json.RawMessage{}
	var entries []json.RawMessage
	if len(bytes.TrimSpace(existing)) > 0 {
		if err := json.Unmarshal(existing, &list); err != nil {
			return nil, fmt.Errorf("parsing the existing conflist: %w", err)
		}
		if raw, ok := list["plugins"]; ok {
			if err := json.Unmarshal(raw, &entries); err != nil {
				return nil, fmt.Errorf("parsing plugins of the existing conflist: %w", err)
			}
		}
	}

	entries, err := replaceOwn(entries, own(p))
	if err != nil {
		return nil, err
	}
	ours := map[string]any{
		"cniVersion":  cniVersion,
		"cniVersions": []string{cniVersion, "1.1.0"},
		"name":        NetworkName,
		"plugins":     entries,
	}
	for key, value := range ours {
		if list[key], err = json.Marshal(value); err != nil {
			return nil, fmt.Errorf("encoding %s of the conflist: %w", key, err)
		}
	}
	out, err := json.MarshalIndent(list, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("encoding the conflist: %w", err)
	}
	return append(out, '\n'), nil
}

// replaceOwn puts each of our entries where an entry of its type stands, and those that are missing directly after the
// one of ours before them, so that what others appended stays behind.
func replaceOwn(entries []json.RawMessage, ours []plugin) ([]json.RawMessage, error) {
	next := 0
	for _, own := range ours {
		raw, err := json.Marshal(own)
		if err != nil {
			return nil, fmt.Errorf("encoding plugin %s: %w", own.Type, err)
		}
		at := -1
		for i, entry := range entries {
			var head struct {
				Type string `json:"type"`
			}
			if err := json.Unmarshal(entry, &head); err != nil {
				return nil, fmt.Errorf("parsing plugins[%d] of the existing conflist: %w", i, err)
			}
			if head.Type == own.Type {
				at = i
				break
			}
		}
		if at < 0 {
			entries = append(entries[:next:next], append([]json.RawMessage{raw}, entries[next:]...)...)
			at = next
		} else {
			entries[at] = raw
		}
		next = at + 1
	}
	return entries, nil
}
