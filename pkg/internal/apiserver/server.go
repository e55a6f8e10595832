// Package apiserver runs a real Kubernetes API server, with its etcd, for one test.
//
// It serves on loopback with its data in a directory of the test, and authorizes as a production cluster does: Node
// and RBAC, with the admission plugin NodeRestriction. There is no controller manager, scheduler or kubelet: what
// they would make (the ServiceAccount "default" of a namespace, a pod's binding to a node) the test makes itself.
//
// The programs come from scripts/tools/build.sh; a test fails where they were not built.
package apiserver

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/rest"
)

// Server is a running API server. It ends with the test that started it.
type Server struct {
	tb   testing.TB
	host string
	ca   *authority
}

// Start runs etcd and an API server, and returns when the server is ready. A server that does not come up fails the
// test with the end of its log.
func Start(tb testing.TB) *Server {
	tb.Helper()
	dir := tb.TempDir()
	ca, err := newAuthority()
	if err != nil {
		tb.Fatal(err)
	}
	if err = writeFiles(dir, ca); err != nil {
		tb.Fatal(err)
	}
	var ports [3]string
	for i := range ports {
		if ports[i], err = freePort(tb.Context()); err != nil {
			tb.Fatal(err)
		}
	}
	etcdURL := "http://127.0.0.1:" + ports[0]
	etcd := start(tb, dir, "etcd", etcdArgs(dir, etcdURL, "http://127.0.0.1:"+ports[1])...)
	api := start(tb, dir, "kube-apiserver", apiArgs(dir, etcdURL, ports[2])...)

	server := &Server{tb: tb, host: "https://127.0.0.1:" + ports[2], ca: ca}
	if err := waitReady(server.Admin(), etcd, api); err != nil {
		tb.Fatal(err)
	}
	return server
}

// Admin returns the configuration of a client that may do everything.
func (s *Server) Admin() *rest.Config {
	s.tb.Helper()
	return s.user("admin", "system:masters")
}

// Kubelet returns the configuration of a client with the credential of a node's kubelet.
func (s *Server) Kubelet(node string) *rest.Config {
	s.tb.Helper()
	return s.user("system:node:"+node, "system:nodes")
}

// Bearer returns the configuration of a client that shows a token, such as one that a TokenRequest gave for a
// ServiceAccount.
func (s *Server) Bearer(token string) *rest.Config {
	config := s.anonymous()
	config.BearerToken = token
	return config
}

func (s *Server) user(name string, groups ...string) *rest.Config {
	s.tb.Helper()
	pair, err := s.ca.issue(pkix.Name{CommonName: name, Organization: groups})
	if err != nil {
		s.tb.Fatal(err)
	}
	config := s.anonymous()
	config.CertData, config.KeyData = pair.certificate, pair.key
	return config
}

// anonymous returns a configuration without a credential. Clients of a test are not held back.
func (s *Server) anonymous() *rest.Config {
	return &rest.Config{
		Host:            s.host,
		TLSClientConfig: rest.TLSClientConfig{CAData: s.ca.pem()},
		QPS:             -1,
	}
}

// writeFiles writes the server's certificate, what it trusts, and the key that signs the tokens of ServiceAccounts.
func writeFiles(dir string, ca *authority) error {
	serving, err := ca.issue(pkix.Name{CommonName: "kube-apiserver"}, net.IPv4(127, 0, 0, 1))
	if err != nil {
		return err
	}
	tokenKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return fmt.Errorf("generating the token key: %w", err)
	}
	tokenPrivate, err := encodeKey(tokenKey)
	if err != nil {
		return err
	}
	tokenPublic, err := x509.MarshalPKIXPublicKey(&tokenKey.PublicKey)
	if err != nil {
		return fmt.Errorf("encoding the token key: %w", err)
	}
	for name, content := range map[string][]byte{
		"ca.crt":      ca.pem(),
		"serving.crt": serving.certificate,
		"serving.key": serving.key,
		"token.key":   tokenPrivate,
		"token.pub":   encode("PUBLIC KEY", tokenPublic),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return fmt.Errorf("writing %s: %w", name, err)
		}
	}
	return nil
}

func etcdArgs(dir, clientURL, peerURL string) []string {
	return []string{
		"--name=test",
		"--data-dir=" + filepath.Join(dir, "etcd"),
		"--listen-client-urls=" + clientURL,
		"--advertise-client-urls=" + clientURL,
		"--listen-peer-urls=" + peerURL,
		"--initial-advertise-peer-urls=" + peerURL,
		"--initial-cluster=test=" + peerURL,
		"--unsafe-no-fsync", // the data ends with the test
	}
}

func apiArgs(dir, etcdURL, port string) []string {
	file := func(name string) string { return filepath.Join(dir, name) }
	return []string{
		"--etcd-servers=" + etcdURL,
		"--bind-address=127.0.0.1",
		"--secure-port=" + port,
		"--endpoint-reconciler-type=none", // a loopback address cannot be an endpoint
		"--service-cluster-ip-range=10.96.0.0/16",
		"--tls-cert-file=" + file("serving.crt"),
		"--tls-private-key-file=" + file("serving.key"),
		"--client-ca-file=" + file("ca.crt"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file=" + file("token.pub"),
		"--service-account-signing-key-file=" + file("token.key"),
		"--authorization-mode=Node,RBAC",
		"--enable-admission-plugins=NodeRestriction",
		"--allow-privileged=true",
	}
}

// waitReady returns when the server says that it is ready, or when one of the two programs ended.
func waitReady(config *rest.Config, etcd, api *process) error {
	client, err := discovery.NewDiscoveryClientForConfig(config)
	if err != nil {
		return fmt.Errorf("making a client of the API server: %w", err)
	}
	const interval, timeout = 50 * time.Millisecond, 2 * time.Minute
	var refused error
	err = wait.PollUntilContextTimeout(context.Background(), interval, timeout, true, func(ctx context.Context) (bool, error) {
		for _, p := range []*process{etcd, api} {
			if ended := p.ended(); ended != nil {
				return false, ended
			}
		}
		_, refused = client.RESTClient().Get().AbsPath("/readyz").DoRaw(ctx)
		return refused == nil, nil
	})
	if wait.Interrupted(err) {
		return fmt.Errorf("waiting for the API server: %w, its last words:\n%s", refused, api.lastWords())
	}
	return err
}
