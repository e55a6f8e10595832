// Package manifests holds what programs need to know of the manifests that belong to their version.
package manifests

import _ "embed"

//go:embed base/admission.yaml
var admission []byte

// Admission returns the admission policies and their bindings, as YAML.
func Admission() []byte { return admission }
