module github.com/warren-cni/warren/scripts/tools/pause

go 1.26.0
