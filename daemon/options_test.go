package main

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

// parse reads a command line and an environment as `warrend run` does.
func parse(args []string, environment map[string]string) (runOptions, error) {
	var o runOptions
	flags := pflag.NewFlagSet("run", pflag.ContinueOnError)
	o.add(flags)
	if err := flags.Parse(args); err != nil {
		return o, err
	}
	err := fromEnvironment(flags, func(name string) (string, bool) {
		value, ok := environment[name]
		return value, ok
	})
	if err != nil {
		return o, err
	}
	_, err = o.validate()
	return o, err
}

func TestOptionsFromEnvironmentAndFlags(t *testing.T) {
	o, err := parse([]string{"--node-name=a", "--wireguard-port=1000"}, map[string]string{
		"WARREN_NODE_NAME": "b", "WARREN_CLUSTER_CIDR": "10.244.0.7/16,fd00:10:244::/56", "WARREN_ENCRYPTION": "off",
	})
	if err != nil {
		t.Fatal(err)
	}
	if o.nodeName != "a" || o.port != 1000 || o.encryptionMode {
		t.Errorf("node %q port %d encryption %v, want a (a flag goes before the environment), 1000, off", o.nodeName, o.port, o.encryptionMode)
	}
	want := []netip.Prefix{netip.MustParsePrefix("10.244.0.0/16"), netip.MustParsePrefix("fd00:10:244::/56")}
	if diff := cmp.Diff(want, o.parsedCluster, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b })); diff != "" {
		t.Errorf("cluster CIDRs (-want +got):\n%s", diff)
	}
}

func TestOptionsRefusedNameTheFlag(t *testing.T) {
	for name, tc := range map[string]struct {
		args        []string
		environment map[string]string
		want        string
	}{
		"no node name":     {nil, nil, "--node-name"},
		"two sources":      {[]string{"--node-name=a", "--objects=x", "--kubeconfig=y"}, nil, "--objects and --kubeconfig"},
		"bad prefix":       {[]string{"--node-name=a", "--cluster-cidr=10.244"}, nil, "--cluster-cidr=10.244"},
		"IPv4 in IPv6":     {[]string{"--node-name=a", "--cluster-cidr=::ffff:10.244.0.0/112"}, nil, "--cluster-cidr=::ffff:10.244.0.0/112"},
		"bad encryption":   {[]string{"--node-name=a", "--encryption=maybe"}, nil, "--encryption=maybe"},
		"bad mode":         {[]string{"--node-name=a", "--wireguard=magic"}, nil, "--wireguard=magic"},
		"small MTU":        {[]string{"--node-name=a", "--mtu=576"}, nil, "--mtu=576"},
		"no port":          {[]string{"--node-name=a", "--wireguard-port=0"}, nil, "--wireguard-port"},
		"bad environment":  {nil, map[string]string{"WARREN_MTU": "large"}, "WARREN_MTU"},
		"bad non-masq":     {[]string{"--node-name=a", "--non-masquerade-cidr=x/8"}, nil, "--non-masquerade-cidr=x/8"},
		"several mistakes": {[]string{"--node-name=a", "--cluster-cidr=z", "--encryption=no"}, nil, "--encryption=no"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parse(tc.args, tc.environment)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error that names %s", err, tc.want)
			}
		})
	}
}
