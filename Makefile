# Warren. `make help` lists the targets; `make demo` and `make test` set up what they need on a fresh Debian machine.
SHELL := /bin/bash
.DEFAULT_GOAL := help

VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
# The version is told, not asked of git, which refuses to answer root about another user's clone.
GO_BUILD := CGO_ENABLED=0 go build -trimpath -buildvcs=false -ldflags "-s -w -X main.version=$(VERSION)"

.PHONY: help build test test-vm soak lint demo bench image manifests kind kind-down e2e clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build build/warren (the CNI plugin) and build/warrend (the daemon)
	@scripts/deps.sh build
	$(GO_BUILD) -o build/warren ./plugin
	$(GO_BUILD) -o build/warrend ./daemon

demo: build ## Three nodes in namespaces: who reaches whom, and what the wire shows
	@scripts/deps.sh test
	go run ./scripts/demo

GUEST ?= test-vm
test: build $(GUEST) ## Run all tests: units, network namespaces, a real API server, and kernel WireGuard under QEMU (GUEST= leaves that out)
	@scripts/deps.sh test
	scripts/tools/build.sh kube-apiserver etcd kubectl
	go test -timeout 20m ./...

soak: build ## Run the proofs ten times as long as `make test` does, also in the guest (WARREN_SOAK=SEED repeats one of its runs)
	@scripts/deps.sh test vm
	scripts/tools/build.sh kube-apiserver etcd
	set -o pipefail; WARREN_SOAK=$${WARREN_SOAK:-1} go test -count=1 -p 1 -timeout 5h -v -run ^TestProof ./daemon ./pkg/internal/proof ./pkg/policy \
		| tee build/soak.log | grep --line-buffered -E "^(--- |FAIL|ok|panic)|proof: |seed [0-9]|_test.go:"
	WARREN_SOAK=$${WARREN_SOAK:-1} scripts/vm/run.sh proofs

test-vm: ## Run the mesh's tests on kernel WireGuard in a QEMU guest
	@scripts/deps.sh test vm
	scripts/vm/run.sh

lint: ## Run the linters
	@scripts/deps.sh lint
	scripts/tools/build.sh golangci-lint
	build/tools/golangci-lint run ./...
	shellcheck -x scripts/*.sh scripts/*/*.sh scripts/kind/runc-capped .ci/run

BENCH ?=
bench: build ## Measure against peers and targets: a table, and lines of JSON (BENCH=list: names, BENCH=NAME,...: these alone)
	@scripts/deps.sh test
	scripts/tools/build.sh kube-apiserver etcd
	go run ./scripts/bench $(if $(filter list,$(BENCH)),--list,--only '$(BENCH)')

image: build ## Write build/warren-image.tar, which ctr, docker and kind load
	@scripts/deps.sh build image
	scripts/image/build.sh

manifests: ## Render manifests/warren.yaml from its parts
	@scripts/deps.sh build
	scripts/tools/build.sh kubectl
	go test ./manifests -update

kind: image ## Create a kind cluster on Warren (options: scripts/kind/up.sh --help)
	@scripts/deps.sh kind
	scripts/kind/up.sh

kind-down: ## Remove the kind cluster and everything that `make kind` started
	scripts/kind/down.sh

e2e: image ## Test on a real two-node kind cluster, in dual stack
	@scripts/deps.sh kind test
	scripts/kind/e2e.sh

clean: kind-down ## Remove build outputs, caches too
	rm -rf build
