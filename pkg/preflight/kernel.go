package preflight

import (
	"errors"
	"fmt"
	"strings"
)

// The oldest kernel on which Warren is used.
const (
	oldestMajor = 5
	oldestMinor = 10
)

// kernel looks at the kernel's version.
func kernel(f Facts, _ Wanted) ([]Finding, error) {
	if f.Kernel.Err != nil {
		return nil, f.Kernel.Err
	}
	var major, minor int
	if _, err := fmt.Sscanf(f.Kernel.Value, "%d.%d", &major, &minor); err != nil {
		return nil, fmt.Errorf("the kernel's release %q says no version", f.Kernel.Value)
	}
	if major > oldestMajor || major == oldestMajor && minor >= oldestMinor {
		return nil, nil
	}
	return []Finding{{
		Severity: Warning, Code: "KernelOld", Object: "Linux " + f.Kernel.Value,
		Message: fmt.Sprintf("Warren is tested on Linux %d.%d and newer; what an older one lacks shows only in use", oldestMajor, oldestMinor),
		Remedy:  "install a newer kernel on the node",
	}}, nil
}

// wireGuard looks whether there is one way at least to have a tunnel, and whether the link can have its name.
func wireGuard(f Facts, w Wanted) ([]Finding, error) {
	if !w.Encrypted {
		return nil, nil
	}
	var findings []Finding
	stands := false
	for _, l := range f.Links.Value {
		if l.Name != ownTunnel {
			continue
		}
		if stands = l.Type == "wireguard" || l.Type == "tuntap"; !stands {
			findings = append(findings, Finding{
				Severity: Error, Code: "LinkTaken", Object: "link " + l.Name,
				Message: fmt.Sprintf("it is of type %s and not Warren's: the tunnel cannot have its name, and no pod starts here", l.Type),
				Remedy:  "rename or delete it",
			})
		}
	}
	if w.UserSpaceOnly {
		if f.TUN.Err == nil && !f.TUN.Value && !stands {
			findings = append(findings, Finding{
				Severity: Error, Code: "NoTUN", Object: "kernel module tun",
				Message: "the kernel has no TUN devices, on which WireGuard runs in user space (--wireguard=userspace): no pod starts here",
				Remedy:  "install and load the module (modprobe tun), or use the kernel's WireGuard (--wireguard=auto)",
			})
		}
		return findings, errors.Join(f.TUN.Err, f.Links.Err)
	}
	if f.WireGuard.Err != nil || f.WireGuard.Value || stands {
		return findings, errors.Join(f.WireGuard.Err, f.Links.Err)
	}
	if w.KernelOnly {
		return append(findings, Finding{
			Severity: Error, Code: "NoWireGuard", Object: "kernel module wireguard",
			Message: "the kernel has no WireGuard, and --wireguard=kernel wants no other: no pod starts here",
			Remedy:  "install and load the module (modprobe wireguard), or say --wireguard=auto and kubectl apply -f manifests/userspace-tunnel.yaml",
		}), f.Links.Err
	}
	missing := Finding{
		Severity: Warning, Code: "NoWireGuard", Object: "kernel module wireguard",
		Message: "the kernel has no WireGuard: no pod starts here until the user-space tunnel runs",
		Remedy: "install and load the module (modprobe wireguard; on some distributions it is in a package of extra modules), " +
			"or kubectl apply -f manifests/userspace-tunnel.yaml",
	}
	if f.TUN.Err == nil && !f.TUN.Value {
		missing.Severity, missing.Object = Error, "kernel modules wireguard and tun"
		missing.Message = "the kernel has neither WireGuard nor TUN devices, on which WireGuard could run in user space: no pod starts here"
		missing.Remedy = "install and load one of the modules (modprobe wireguard, or modprobe tun and kubectl apply -f manifests/userspace-tunnel.yaml)"
	}
	return append(findings, missing), errors.Join(f.TUN.Err, f.Links.Err)
}

// packetFilter looks whether all that the rules need is there.
func packetFilter(f Facts, _ Wanted) ([]Finding, error) {
	var findings []Finding
	for _, l := range f.Lacks.Value {
		findings = append(findings, Finding{
			Severity: Error, Code: "PacketFilterLacks", Object: l.Feature,
			Message: "rules of Warren's need it, and the kernel refuses it: " + strings.TrimSpace(l.Err.Error()),
			Remedy:  fmt.Sprintf("load the kernel module (modprobe %s), or install a kernel that has it", l.Module),
		})
	}
	return findings, f.Lacks.Err
}

// backend looks whether programs use one backend of iptables.
func backend(f Facts, _ Wanted) ([]Finding, error) {
	var findings []Finding
	for _, p := range f.Filter.Value.Problems {
		findings = append(findings, ofProblem(Warning, p))
	}
	return findings, f.Filter.Err
}
