//go:build e2e

package e2e

import (
	"testing"
	"time"
)

// tier is one of the namespaces of the example, which is also the label of its pods.
type tier struct {
	name string
	port int32
	// reaches is the one tier that this one may open connections to.
	reaches string
}

// exampleTiers are the tiers of manifests/examples/tiers.yaml.
func exampleTiers() []tier {
	return []tier{{"web", 8080, "api"}, {"api", 8080, "database"}, {"database", 5432, ""}}
}

// testTiers applies the example of three tiers and checks who reaches whom, each tier having a probe on each node.
func (c *cluster) testTiers(t *testing.T) {
	c.applyFile(t, "manifests/examples/tiers.yaml")
	pods := map[tier][]*probePod{}
	for _, tier := range exampleTiers() {
		for _, node := range c.nodes() {
			pods[tier] = append(pods[tier], &probePod{
				name: "probe-" + node, node: node, port: tier.port, labels: map[string]string{"app": tier.name},
			})
		}
		c.start(t, tier.name, pods[tier]...)
	}
	c.awaitTable(t, tiersTable(pods, func(from, to tier) (tcp, udp bool) { return from.reaches == to.name, false }))
	t.Run("commands of the example", c.testTiersCommands)

	for _, tier := range exampleTiers() {
		c.kubectl(t, "delete", "networkpolicies", "--all", "--namespace", tier.name)
	}
	c.awaitTable(t, tiersTable(pods, func(tier, tier) (tcp, udp bool) { return true, true }))
}

// tiersTable says who reaches whom among the pods of all tiers.
func tiersTable(pods map[tier][]*probePod, allowed func(from, to tier) (tcp, udp bool)) reachTable {
	table := reachTable{}
	for from, sources := range pods {
		for to, targets := range pods {
			tcp, udp := allowed(from, to)
			for _, source := range sources {
				for _, target := range targets {
					if source != target {
						table.setEach(from.name+"/"+source.name, target, tcp, udp)
					}
				}
			}
		}
	}
	return table
}

// testTiersCommands runs what the example tells its reader to run, against its own pods and Services.
func (c *cluster) testTiersCommands(t *testing.T) {
	c.applyFile(t, "manifests/examples/tiers-pods.yaml")
	for _, tier := range exampleTiers() {
		c.kubectl(t, "rollout", "status", "--namespace", tier.name, "deployment/"+tier.name, "--timeout=60s")
	}
	connect := func(from, service string) error {
		_, err := try(t.Context(), command{name: c.tool("kubectl"), args: []string{
			"exec", "--namespace", from, "deployment/" + from, "--", "/agnhost", "connect", service, "--timeout=3s",
		}, timeout: 30 * time.Second})
		return err
	}
	for _, allowed := range [][2]string{{"web", "api.api:8080"}, {"api", "database.database:5432"}} {
		if err := connect(allowed[0], allowed[1]); err != nil {
			t.Errorf("%s does not reach %s: %v", allowed[0], allowed[1], err)
		}
	}
	if err := connect("web", "database.database:5432"); err == nil {
		t.Error("web reaches database.database:5432")
	}
}
