package preflight

import (
	"encoding/xml"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// Zones are the texts of two zones of firewalld (firewalld.zone(5)): the one that lets everything pass, and the one that links are in
// without another. Empty is one that nobody has changed.
type Zones struct{ Trusted, Default string }

// permission is what a firewall has to let pass, by the command that has it do so.
type permission struct {
	command string
	given   bool
}

// firewalls looks for programs that drop what pods send and receive, and whether they were told to let it pass.
func firewalls(f Facts, w Wanted) ([]Finding, error) {
	var findings []Finding
	errs := []error{f.Filter.Err, f.Programs.Err}
	if standsIn(f, "firewalld", "firewalld") {
		errs = append(errs, f.Firewalld.Err)
		findings = append(findings, lets(firewalldPermissions(f.Firewalld.Value, w), "firewall-cmd --reload", Finding{
			Severity: Warning, Code: "Firewalld", Object: "firewalld",
			Message: "it rejects what it does not know: the tunnel's packets, and what pods send and receive",
			Remedy:  "systemctl disable --now firewalld",
		})...)
	}
	if standsIn(f, "", "", "ufw-user-input", "ufw6-user-input") { // its other chains stay until the next boot, empty, when it is disabled
		errs = append(errs, f.UFW.Err)
		findings = append(findings, lets(ufwPermissions(f.UFW.Value, w), "", Finding{
			Severity: Warning, Code: "UFW", Object: "ufw",
			Message: "its chains stand in iptables; it drops what it does not know: the tunnel's packets, and what pods send and receive",
			Remedy:  "ufw disable",
		})...)
	}
	return findings, errors.Join(errs...)
}

// lets completes the remedy of a firewall's finding by the commands that give what it does not let pass yet, and one that comes after them.
// There is no finding where it lets everything pass.
func lets(permissions []permission, after string, found Finding) []Finding {
	var commands []string
	for _, p := range permissions {
		if !p.given {
			commands = append(commands, p.command)
		}
	}
	if len(commands) == 0 {
		return nil
	}
	if after != "" {
		commands = append(commands, after)
	}
	found.Remedy += ", or let Warren pass: " + strings.Join(commands, "; ")
	return []Finding{found}
}

// podNetworks are the networks of all pods as a command names them. What is not known stands in capitals.
func podNetworks(w Wanted) []string {
	if len(w.ClusterCIDRs) == 0 {
		return []string{"CLUSTER-CIDR"}
	}
	var names []string
	for _, p := range w.ClusterCIDRs {
		names = append(names, p.String())
	}
	return names
}

// firewalldPermissions are those of what pods send, and of the tunnel's port.
func firewalldPermissions(z Zones, w Wanted) []permission {
	trusted, standard := parseZone(z.Trusted), parseZone(z.Default)
	var all []permission
	for _, pods := range podNetworks(w) {
		is := slices.ContainsFunc(trusted.Sources, func(s zoneSource) bool { return sameNetwork(s.Address, pods) })
		all = append(all, permission{"firewall-cmd --permanent --zone=trusted --add-source=" + pods, is})
	}
	if w.Encrypted {
		port := zonePort{Port: fmt.Sprint(w.Port), Protocol: "udp"}
		all = append(all, permission{"firewall-cmd --permanent --add-port=" + port.Port + "/udp", slices.Contains(standard.Ports, port)})
	}
	return all
}

// zone is what of a zone's file matters here.
type zone struct {
	Sources []zoneSource `xml:"source"`
	Ports   []zonePort   `xml:"port"`
}

type zoneSource struct {
	Address string `xml:"address,attr"`
}

type zonePort struct {
	Port     string `xml:"port,attr"`
	Protocol string `xml:"protocol,attr"`
}

// parseZone reads a zone's file; what is none gives no permission.
func parseZone(text string) (z zone) {
	_ = xml.Unmarshal([]byte(text), &z)
	return z
}

// sameNetwork says whether two texts name one network.
func sameNetwork(a, b string) bool {
	one, err := netip.ParsePrefix(a)
	other, otherErr := netip.ParsePrefix(b)
	return err == nil && otherErr == nil && one == other
}

// ufwPermissions are those of what is forwarded, of what pods send to the node, and of the tunnel's port, by the texts of ufw's files.
func ufwPermissions(texts []string, w Wanted) []permission {
	var lines []string
	for _, text := range texts {
		for line := range strings.Lines(text) {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	has := func(line string) bool { return slices.Contains(lines, line) }
	withoutIPv6 := slices.ContainsFunc(lines, isWithoutIPv6)
	all := []permission{{"ufw default allow routed", has(`DEFAULT_FORWARD_POLICY="ACCEPT"`)}}
	for _, pods := range podNetworks(w) {
		chain := "ufw-user-input"
		if strings.Contains(pods, ":") {
			chain = "ufw6-user-input"
			if withoutIPv6 { // then it drops all of it, whatever its rules are
				all = append(all, permission{command: "set IPV6=yes in /etc/default/ufw; ufw reload"})
				withoutIPv6 = false // once
			}
		}
		all = append(all, permission{"ufw allow from " + pods, has("-A " + chain + " -s " + pods + " -j ACCEPT")})
	}
	if w.Encrypted { // of IPv4 and IPv6, by one command, but where ufw leaves IPv6 alone
		open := has(fmt.Sprintf("-A ufw-user-input -p udp --dport %d -j ACCEPT", w.Port))
		all = append(all, permission{fmt.Sprintf("ufw allow %d/udp", w.Port), open})
	}
	return all
}

// isWithoutIPv6 says whether a line of ufw's defaults has it leave out IPv6. It reads them in any case, with quotation marks or without.
func isWithoutIPv6(line string) bool {
	name, value, _ := strings.Cut(strings.ToLower(line), "=")
	return name == "ipv6" && strings.Trim(value, `"'`) != "yes"
}

// standsIn says whether a program of that name runs, or a table or one of the chains of those names stands; "" is no name.
func standsIn(f Facts, program, table string, chains ...string) bool {
	return program != "" && slices.Contains(f.Programs.Value, program) ||
		table != "" && slices.Contains(f.Filter.Value.Tables, table) ||
		slices.ContainsFunc(chains, func(name string) bool { return slices.Contains(f.Filter.Value.Chains, name) })
}
