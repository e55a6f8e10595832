package preflight

import "fmt"

// directories looks whether Warren can write where it has to.
func directories(f Facts, _ Wanted) ([]Finding, error) {
	var findings []Finding
	for _, d := range f.Directories.Value {
		switch {
		case d.Problem != "":
			findings = append(findings, Finding{
				Severity: Error, Code: "DirectoryNotWritable", Object: d.Path, Message: "Warren cannot write there: " + d.Problem,
				Remedy: fmt.Sprintf("make it writable, or name another one by %s (the container runtime has to look there, too, for CNI's)", d.Flag),
			})
		case d.ForBinaries && d.NoExec:
			findings = append(findings, Finding{
				Severity: Error, Code: "DirectoryNoExec", Object: d.Path,
				Message: "it is mounted noexec: the runtime cannot run the plugin, and no pod starts here",
				Remedy:  fmt.Sprintf("mount it without noexec, or name another one by %s and in the runtime's configuration", d.Flag),
			})
		case d.ForBoot && !d.Memory:
			findings = append(findings, Finding{
				// The daemon ends the leases of another boot, and until it is ready the plugin refuses.
				Severity: Warning, Code: "RunDirOutlivesBoot", Object: d.Path,
				Message: "it is on a disk: after a reboot the conflist of the boot before is taken for this one's and stays, so that the node may be Ready before warrend is; " +
					"pods are refused until then, and tried again",
				Remedy: fmt.Sprintf("name a directory on a tmpfs by %s, for example below /run", d.Flag),
			})
		}
	}
	return findings, f.Directories.Err
}

// admission looks whether stolen credentials are confined.
func admission(f Facts, _ Wanted) ([]Finding, error) {
	var findings []Finding
	for _, p := range f.Admission.Value {
		findings = append(findings, ofProblem(Warning, p))
	}
	return findings, f.Admission.Err
}
