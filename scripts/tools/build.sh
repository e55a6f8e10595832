#!/usr/bin/env bash
# Builds third-party tools from the Go module proxy into build/tools/, at the versions pinned in scripts/tools/*/go.mod.
# Usage: scripts/tools/build.sh TOOL|GROUP...
#   tools:  golangci-lint etcd kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubelet kubeadm kubectl
#           kind coredns agnhost pause e2e.test ginkgo
#   groups: lint, apiserver (an API server alone), cluster (kind and what its node image holds), suite (Kubernetes' own
#           e2e tests of the network)
# With --stamps first it builds nothing and prints what the named tools were built from, as one hash each.
# A tool is built again only when its pinned versions, flags or Go itself change.
set -euo pipefail
cd "$(dirname "$0")/../.."
root=$PWD
out=$root/build/tools

# members prints the tools that a name stands for.
members() {
  case "$1" in
    lint)      echo golangci-lint ;;
    apiserver) echo kube-apiserver etcd ;;
    cluster)   echo kube-apiserver etcd kubeadm kubelet kubectl kube-controller-manager kube-scheduler kube-proxy \
                 kind coredns agnhost pause ;;
    suite)     echo e2e.test ginkgo ;;
    *)         echo "$1" ;;
  esac
}

# source_of prints the nested module and the package of a tool.
source_of() {
  case "$1" in
    golangci-lint) echo lint github.com/golangci/golangci-lint/v2/cmd/golangci-lint ;;
    etcd)          echo etcd go.etcd.io/etcd/server/v3 ;;
    coredns)       echo coredns ./cluster ;;
    kind)          echo kind sigs.k8s.io/kind ;;
    kube-apiserver | kube-controller-manager | kube-scheduler | kube-proxy | kubelet | kubeadm | kubectl)
                   echo kubernetes "k8s.io/kubernetes/cmd/$1" ;;
    agnhost)       echo kubernetes k8s.io/kubernetes/test/images/agnhost ;;
    e2e.test)      echo kubernetes ./suite ;;
    ginkgo)        echo kubernetes github.com/onsi/ginkgo/v2/ginkgo ;;
    pause)         echo pause . ;;
    *) echo "build.sh: unknown tool '$1'" >&2; return 2 ;;
  esac
}

# linker_flags prints the flags of a module's tools. Clients refuse a Kubernetes without a version.
linker_flags() {
  local flags="-s -w" version package
  if [ "$1" = kubernetes ]; then
    version=$(cd scripts/tools/kubernetes && go list -m -f '{{.Version}}' k8s.io/kubernetes)
    IFS=. read -r major minor _ <<<"${version#v}"
    for package in k8s.io/component-base/version k8s.io/client-go/pkg/version; do
      flags+=" -X $package.gitVersion=$version -X $package.gitMajor=$major -X $package.gitMinor=$minor"
    done
  fi
  echo "$flags"
}

# stamp_of prints a hash of what a tool is built from: pinned versions, our own source where it is ours, flags and Go.
stamp_of() {
  local module=scripts/tools/$1 package=$2
  {
    cat "$module/go."*
    [[ "$package" != .* ]] || cat "$module/$package/"*.go
    echo "$package $3"
    go version
  } | sha256sum | cut -c1-64
}

# build makes one tool, statically linked, so that it runs in an image that holds nothing else.
build() {
  local tool=$1 module package flags stamp started
  read -r module package <<<"$(source_of "$tool")"
  flags=$(linker_flags "$module")
  stamp=$(stamp_of "$module" "$package" "$flags")
  if [ -x "$out/$tool" ] && [ "$(cat "$out/.stamps/$tool" 2>/dev/null)" = "$stamp" ]; then
    return 0
  fi
  echo "build.sh: building $tool" >&2
  started=$SECONDS
  local command=(go build -buildvcs=false)
  [ "$tool" != e2e.test ] || command=(go test -c)
  (cd "scripts/tools/$module" && CGO_ENABLED=0 nice -n 10 "${command[@]}" -trimpath -ldflags "$flags" -o "$out/$tool" "$package")
  echo "$stamp" >"$out/.stamps/$tool"
  echo "build.sh: built $tool in $((SECONDS - started)) s" >&2
}

[ $# -gt 0 ] || { sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; }
if [ "$1" = --stamps ]; then
  shift
  for name in "$@"; do
    for tool in $(members "$name"); do cat "$out/.stamps/$tool"; done
  done
  exit
fi
mkdir -p "$out/.stamps"
for name in "$@"; do
  for tool in $(members "$name"); do
    # Two at once would do the same work twice. A lock for each tool: who needs another one does not wait.
    exec 9>"$out/.stamps/$tool.lock"
    flock 9
    build "$tool"
    exec 9>&-
  done
done
