package cniconf

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// Ahead is a file in the CNI configuration directory that the runtime reads before ours, because it sorts before it.
type Ahead struct {
	Path string
	// Delegates says that pods get Warren all the same: the file calls our plugin, as those of Multus and Istio do.
	Delegates bool
	// Err says why the file cannot be understood; nil where it can be. Such a file may keep the runtime from loading any.
	Err error
}

// AheadOf returns what stands before our conflist in dir, in the order in which a runtime reads it.
func AheadOf(dir string) ([]Ahead, error) {
	files, err := os.ReadDir(dir) // sorted
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("looking for network configurations ahead of ours: %w", err)
	}
	var found []Ahead
	for _, file := range files {
		if file.Name() >= FileName || file.IsDir() || !slices.Contains(extensions, filepath.Ext(file.Name())) {
			continue
		}
		one := Ahead{Path: filepath.Join(dir, file.Name())}
		data, err := os.ReadFile(one.Path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // it went meanwhile
		}
		var config any
		if err == nil {
			err = json.Unmarshal(data, &config)
		}
		one.Delegates, one.Err = err == nil && callsOurs(config), err
		found = append(found, one)
	}
	return found, nil
}

// extensions are those of the files that runtimes read.
var extensions = []string{".conf", ".conflist", ".json"} //nolint:gochecknoglobals // a constant list

// multusTypes are the plugins of Multus: the thin one, and that of the thick one, whose daemon sees the host's files below /host.
var multusTypes = []any{"multus", "multus-shim"} //nolint:gochecknoglobals // a constant list

// callsOurs tells whether a configuration, or one that it holds, is of our plugin's type, or is Multus's and names our network.
func callsOurs(config any) bool {
	switch c := config.(type) {
	case []any:
		return slices.ContainsFunc(c, callsOurs)
	case map[string]any:
		if c["type"] == pluginType || slices.Contains(multusTypes, c["type"]) && namesOurs(c["clusterNetwork"]) {
			return true
		}
		return callsOurs(c["plugins"]) || callsOurs(c["delegates"])
	default:
		return false
	}
}

// namesOurs tells whether a clusterNetwork of Multus's is our network: its name, that of its file, or the file's path.
func namesOurs(network any) bool {
	text, ok := network.(string)
	base := filepath.Base(text)
	return ok && (text == NetworkName || base == FileName || base == strings.TrimSuffix(FileName, filepath.Ext(FileName)))
}
