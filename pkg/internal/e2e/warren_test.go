//go:build e2e

// Package e2e tests Warren as the network of a real cluster: two nodes made by kind without a network, real kubelets,
// kube-proxy and CoreDNS. scripts/kind/e2e.sh brings the cluster up, runs these tests, and takes it away.
//
// The parts of TestWarren follow one another on one cluster. Each can run alone on a cluster that is kept (KEEP=1) and
// has Warren: RUN=TestWarren/tiers scripts/kind/e2e.sh.
package e2e

import "testing"

func TestWarren(t *testing.T) {
	c := connect(t)
	if !t.Run("install", c.testInstall) {
		t.Fatal("nothing works without a network")
	}
	t.Run("pods", c.testPods)
	t.Run("denied", c.testDenied)
	t.Run("own service", c.testOwnService)
	t.Run("forward", c.testForward)
	t.Run("baseline", c.testBaseline)
	t.Run("tiers", c.testTiers)
	t.Run("race", c.testRace)
	t.Run("cut", c.testCut)
	t.Run("told", c.testTold)
	t.Run("plaintext", c.testPlaintext)
	t.Run("mesh", c.testMesh)
	t.Run("rollout", c.testRollout)
	t.Run("killed", c.testKilled)
	t.Run("chained", c.testChained)
	t.Run("secrets", c.testSecrets)
	t.Run("churn", c.testChurn)
	t.Run("reboot", c.testReboot)
	t.Run("upgrade", c.testUpgrade)
	t.Run("capabilities", c.testCapabilities)
	t.Run("upstream", c.testUpstream)
	t.Run("kube-proxy in nftables mode", c.testKubeProxyNFTables)
	t.Run("uninstall", c.testUninstall)
}
