package main

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"testing"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/kube"
)

// away is a server that does not answer.
type away struct{}

var errAway = errors.New("the server is away")

func (away) Service(context.Context, string, string) (cluster.Service, error) {
	return cluster.Service{}, errAway
}

func (away) ServiceAt(context.Context, netip.Addr) (cluster.Service, bool, error) {
	return cluster.Service{}, false, errAway
}

// Without its server a daemon cannot answer for a Service; for an address it can, and says what it does not know.
func TestExplainWithoutServer(t *testing.T) {
	snapshot, _, err := kube.Load(explainObjects, "worker-1")
	if err != nil {
		t.Fatal(err)
	}
	f := facts{snapshot: snapshot, encrypted: true}
	if err = f.lookUp(t.Context(), away{}, "svc/shop/api"); !errors.Is(err, errAway) {
		t.Errorf("a Service: %v", err)
	}
	question := agentapi.Explain{From: "shop/web", To: "198.51.100.1", Port: "443"}
	if err = f.lookUp(t.Context(), away{}, question.To); err != nil {
		t.Fatal(err)
	}
	e, err := explain(f, question)
	if err != nil {
		t.Fatal(err)
	}
	if e.settle(); e.Answer != allowed || len(e.Notes) != 1 || !strings.Contains(e.Notes[0], "whether 198.51.100.1 is the address of a Service is not known (the server is away)") {
		t.Errorf("an address: %+v", e)
	}
	for _, to := range []string{"shop/api", "10.244.2.2", "192.0.2.1", "10.244.2.77", "nonsense"} {
		f = facts{snapshot: snapshot}
		if err = f.lookUp(t.Context(), away{}, to); err != nil || len(f.notes) != 0 {
			t.Errorf("%s: the server was asked: %v, %v", to, f.notes, err)
		}
	}
}
