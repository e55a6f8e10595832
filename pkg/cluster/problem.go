package cluster

import (
	"cmp"
	"fmt"
	"slices"
)

// Problem is something that an operator has to mend. What it names is closed, or keeps its last good state, until then.
type Problem struct {
	// Code is stable and can be searched for, for example "PolicyInvalid".
	Code string `json:"code"`
	// Object names the object, file or device, for example "NetworkPolicy shop/api" or "Node worker-2".
	Object string `json:"object"`
	// Field is the path of the field inside the object; empty where there is none.
	Field string `json:"field,omitempty"`
	// Message says what is wrong and what follows from it.
	Message string `json:"message"`
	// Remedy says what to do.
	Remedy string `json:"remedy"`
	// Owner is the name of the Node that keeps what the object, another Node, claims; empty where there is none.
	Owner string `json:"owner,omitempty"`
}

// String renders the problem on one line, for logs.
func (p Problem) String() string {
	subject := p.Object
	if p.Field != "" {
		subject += " " + p.Field
	}
	return fmt.Sprintf("%s: %s: %s: %s", p.Code, subject, p.Message, p.Remedy)
}

// SortProblems orders problems and removes those that are there twice.
func SortProblems(problems []Problem) []Problem {
	sorted := slices.Clone(problems)
	slices.SortFunc(sorted, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Code, b.Code), cmp.Compare(a.Object, b.Object), cmp.Compare(a.Field, b.Field), cmp.Compare(a.Message, b.Message))
	})
	return slices.Compact(sorted)
}
