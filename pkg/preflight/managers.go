package preflight

import (
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"
)

// The processes of the programs that configure networks, as the kernel shortens their names.
const (
	networkdProcess       = "systemd-network"
	networkManagerProcess = "NetworkManager"
)

// networkManagers looks for programs that would take Warren's routes or links for stray ones.
func networkManagers(f Facts, w Wanted) ([]Finding, error) {
	if f.Programs.Err != nil {
		return nil, f.Programs.Err
	}
	var findings []Finding
	var errs []error
	if slices.Contains(f.Programs.Value, networkdProcess) {
		errs = append(errs, f.Networkd.Err)
		if f.Networkd.Err == nil {
			findings = append(findings, networkd(f.Networkd.Value)...)
		}
	}
	if slices.Contains(f.Programs.Value, networkManagerProcess) {
		errs = append(errs, f.NetworkManager.Err)
		if f.NetworkManager.Err == nil {
			findings = append(findings, networkManager(f, w)...)
		}
	}
	return findings, errors.Join(errs...)
}

// networkd looks whether systemd-networkd leaves routes and rules of others alone. Its default is not to.
func networkd(texts []string) []Finding {
	manages := func(key string) bool {
		return !slices.Contains([]string{"no", "n", "false", "f", "off", "0"}, strings.ToLower(last(texts, "Network", key)))
	}
	if !manages("ManageForeignRoutes") && !manages("ManageForeignRoutingPolicyRules") {
		return nil
	}
	return []Finding{{
		Severity: Warning, Code: "NetworkdManagesRoutes", Object: "systemd-networkd",
		Message: "it removes the routes and rules of others when it starts or a link changes: until the next audit of warrend repairs it pods lose their way to other nodes, and with --encrypt-node-traffic what they send to nodes is in clear",
		// Both, because the file may be there with one of them.
		Remedy: `mkdir -p /etc/systemd/networkd.conf.d && printf '[Network]\nManageForeignRoutes=no\nManageForeignRoutingPolicyRules=no\n' ` +
			`> /etc/systemd/networkd.conf.d/90-warren.conf && systemctl restart systemd-networkd`,
	}}
}

// networkManager looks whether NetworkManager leaves Warren's links alone, by their names or types.
func networkManager(f Facts, w Wanted) []Finding {
	devices := strings.FieldsFunc(last(f.NetworkManager.Value, "keyfile", "unmanaged-devices"), func(r rune) bool { return r == ';' || r == ',' })
	unmanaged := func(link, kind string) bool {
		matches := false
		for _, device := range devices {
			named, except := strings.CutPrefix(strings.TrimSpace(device), "except:")
			pattern, typed := strings.CutPrefix(named, "type:")
			what := kind
			if !typed {
				pattern, what = strings.TrimPrefix(strings.TrimPrefix(named, "interface-name:"), "="), link // or the name alone, or "*"
			}
			ok, err := path.Match(pattern, what)
			if ok = ok && err == nil; ok && except {
				return false
			}
			matches = matches || ok
		}
		return matches
	}
	tunnel := "wireguard"
	if w.UserSpaceOnly || !f.WireGuard.Value {
		tunnel = "tun"
	}
	if unmanaged(ownTunnel, tunnel) && unmanaged(ownPods+"0123456789ab", "veth") {
		return nil
	}
	return []Finding{{
		Severity: Warning, Code: "NetworkManagerManagesLinks", Object: "NetworkManager",
		Message: "it may take the links of pods and the tunnel for its own, and change their addresses and routes",
		Remedy: fmt.Sprintf(`printf '[keyfile]\nunmanaged-devices+=interface-name:%s*;interface-name:%s\n' > /etc/NetworkManager/conf.d/90-warren.conf && systemctl reload NetworkManager`,
			ownPods, ownTunnel),
	}}
}

// last returns the value that a key of a section has at the end of configuration files (systemd.syntax(7), NetworkManager.conf(5)):
// "key=" sets it, "key+=" adds to it with a semicolon.
func last(texts []string, section, key string) string {
	value := ""
	for _, text := range texts {
		here := ""
		for line := range strings.Lines(text) {
			line = strings.TrimSpace(line)
			if name, ok := strings.CutPrefix(line, "["); ok {
				here = strings.TrimSuffix(name, "]")
				continue
			}
			name, set, ok := strings.Cut(line, "=")
			if !ok || here != section || strings.HasPrefix(line, "#") || strings.HasPrefix(line, ";") {
				continue
			}
			name, set = strings.TrimSpace(name), strings.TrimSpace(set)
			switch name {
			case key:
				value = set
			case key + "+":
				value = strings.TrimPrefix(value+";"+set, ";")
			}
		}
	}
	return value
}
