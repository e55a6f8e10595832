package main

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// answers is a probe that gets through or not.
func answers(open bool) func(context.Context, netip.AddrPort) error {
	return func(context.Context, netip.AddrPort) error {
		if open {
			return nil
		}
		return errors.New("no answer")
	}
}

func TestTableTellsEveryDifference(t *testing.T) {
	attempts := []attempt{
		{from: "web", to: "api", what: "good", expected: true, probe: answers(true)},
		{from: "web", to: "api", what: "lost", expected: true, probe: answers(false)},
		{from: "api", to: "web", what: "closed", probe: answers(false)},
		{from: "api", to: "web", what: "leak", probe: answers(true)},
	}
	try(t.Context(), attempts, attempt.patience)
	var out strings.Builder
	wrong, err := table(&out, []string{"web", "api"}, []string{"web", "api"}, attempts)
	if err != nil {
		t.Fatal(err)
	}
	if len(wrong) != 2 || wrong[0].what != "lost" || wrong[1].what != "leak" {
		t.Errorf("wrong: %+v", wrong)
	}
	for _, want := range []string{"yes: 1 of 2 WRONG", "no: 1 of 2 WRONG"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("the table lacks %q:\n%s", want, out.String())
		}
	}
}

// A loss and a leak in one field must not outweigh each other.
func TestTableCountsNotOnlySums(t *testing.T) {
	attempts := []attempt{
		{from: "web", to: "api", expected: true, probe: answers(false)},
		{from: "web", to: "api", probe: answers(true)},
	}
	try(t.Context(), attempts, func(attempt) time.Duration { return time.Second })
	wrong, err := table(&strings.Builder{}, []string{"web"}, []string{"api"}, attempts)
	if err != nil || len(wrong) != 2 {
		t.Errorf("wrong: %+v, %v", wrong, err)
	}
}

func TestCheckMakesTheDemoFail(t *testing.T) {
	var out strings.Builder
	d := &demo{out: &out}
	if err := d.check(true, "%d is fine", 1); err != nil {
		t.Error(err)
	}
	if err := d.check(false, "%d is not", 2); err == nil || !strings.Contains(err.Error(), "2 is not") {
		t.Errorf("a wrong check returned %v", err)
	}
	if got := out.String(); got != "   ok     1 is fine\n   WRONG  2 is not\n" {
		t.Errorf("printed %q", got)
	}
}

func TestExampleIsReadWithoutItsWorkloads(t *testing.T) {
	read, err := loadTiers("../../manifests/examples/tiers.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, tier := range tiers() {
		found := 0
		for _, policy := range read.policies {
			if policy.Namespace == tier.name {
				found++
			}
		}
		if found == 0 {
			t.Errorf("no policy for tier %s", tier.name)
		}
	}
	changed := read.withoutIngress("api")
	if len(changed) == 0 {
		t.Error("no policy lets anybody into api")
	}
	for _, policy := range changed {
		if len(policy.Spec.Ingress) > 0 {
			t.Errorf("policy %s still lets somebody in", policy.Name)
		}
	}
}

func TestExampleThatIsNone(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.yaml")
	if err := os.WriteFile(path, []byte("kind: ConfigMap\napiVersion: v1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := loadTiers(path); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("a file without tiers: %v", err)
	}
}
