package main

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"

	"github.com/warren-cni/warren/pkg/keyproof"
)

// writeExample makes a directory of objects: two nodes, a pod on each, and the policies of the tiers.
func writeExample(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	tiers, err := os.ReadFile("../manifests/examples/tiers.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var objects strings.Builder
	for number := 1; number <= 2; number++ {
		key, proof := provenKey(t, byte(number))
		fmt.Fprintf(&objects, `---
apiVersion: v1
kind: Node
metadata:
  name: node-%[1]d
  annotations: {warren.cni/wireguard-public-key: %[2]q, warren.cni/wireguard-key-proof: %[3]q, warren.cni/wireguard-port: "51820"}
spec: {podCIDRs: [10.244.%[1]d.0/24]}
status: {addresses: [{type: InternalIP, address: 192.0.2.%[1]d}]}
---
apiVersion: v1
kind: Pod
metadata: {namespace: api, name: api-%[1]d, uid: uid-%[1]d, labels: {app: api}}
spec: {nodeName: node-%[1]d, containers: [{name: main, image: none}]}
status: {podIPs: [{ip: 10.244.%[1]d.7}]}
`, number, key, proof)
	}
	for name, text := range map[string]string{"tiers.yaml": string(tiers), "objects.yaml": objects.String()} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// provenKey returns the public key of a Node of the example and the proof of it, as annotations say them.
func provenKey(t *testing.T, number byte) (key, proof string) {
	t.Helper()
	private := wgtypes.Key(bytes.Repeat([]byte{number}, wgtypes.KeyLen))
	signed, err := keyproof.Sign(private, fmt.Sprintf("node-%d", number), "")
	if err != nil {
		t.Fatal(err)
	}
	return private.PublicKey().String(), base64.StdEncoding.EncodeToString(signed[:])
}

// warrend runs a command of warrend's in this process.
func warrend(t *testing.T, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errs bytes.Buffer
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&errs)
	err = root.ExecuteContext(t.Context())
	return out.String(), errs.String(), err
}

func TestRenderPrintsRulesSetsAndMesh(t *testing.T) {
	out, errs, err := warrend(t, "render", "--objects", writeExample(t), "--node", "node-1", "--cluster-cidr", "10.244.0.0/16")
	if err != nil {
		t.Fatalf("%v\n%s", err, errs)
	}
	for _, want := range []string{
		"# ipv4", "# ipv6", "*mangle", "-j WARREN-POLICY", "10.244.1.7",
		"link warren0 mtu 1440 port 51820", "address 10.244.1.1/32", "endpoint 192.0.2.2:51820 allowed-ips 10.244.2.0/24 # node-2",
		"route 10.244.2.0/24 dev warren0 src 10.244.1.1", "route unreachable 10.244.0.0/16",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("the plan lacks %q", want)
		}
	}
	if t.Failed() {
		t.Log(out)
	}
}

func TestRenderTellsProblems(t *testing.T) {
	dir := writeExample(t)
	if err := os.WriteFile(filepath.Join(dir, "bad.yaml"), []byte(badPolicy), 0o600); err != nil {
		t.Fatal(err)
	}
	out, errs, err := warrend(t, "render", "--objects", dir, "--node", "node-1")
	if err == nil || !strings.Contains(errs, "shop/impossible") || !strings.Contains(out, "-j WARREN-POLICY") {
		t.Errorf("%v\n%s\n%s", err, errs, out)
	}
	for name, args := range map[string][]string{
		"no such node":      {"--objects", dir, "--node", "node-9"},
		"no such directory": {"--objects", filepath.Join(dir, "none"), "--node", "node-1"},
		"nothing said":      {},
	} {
		if _, _, err = warrend(t, append([]string{"render"}, args...)...); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// A policy that names a Service's address is enforced as it is written, and so no problem, but it does not do what it seems to.
func TestRenderWarnsOfServiceAddresses(t *testing.T) {
	_, errs, err := warrend(t, "render", "--objects", explainObjects, "--node", "worker-1")
	want := "warning: BlockNamesService: NetworkPolicy shop/web spec.egress[1]: 10.96.0.0/16 holds the address of Service kube-system/dns and of 1 more and none of the endpoints"
	if !strings.HasPrefix(errs, want) || strings.Count(errs, "warning:") != 1 {
		t.Errorf("no %q in:\n%s", want, errs)
	}
	if err == nil || err.Error() != "1 problem(s)" { // worker-2 has no key
		t.Errorf("the exit status is that of %v", err)
	}
}
