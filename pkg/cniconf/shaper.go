package cniconf

import (
	"errors"
	"fmt"

	"github.com/containernetworking/plugins/pkg/ip"
	"github.com/containernetworking/plugins/pkg/utils"
	"golang.org/x/sys/unix"
)

// RemoveShapers removes the links through which the reference plugin bandwidth has led what containers of a network send. It deletes them
// itself where a runtime tells it that the pod is gone; nothing else does.
func RemoveShapers(network string, containers ...string) error {
	var errs []error
	for _, container := range containers {
		name := utils.MustFormatHashWithPrefix(unix.IFNAMSIZ-1, "bwp", network+container)
		if err := ip.DelLinkByName(name); err != nil && !errors.Is(err, ip.ErrLinkNotFound) {
			errs = append(errs, fmt.Errorf("removing the device %s, which limited a pod's bandwidth: %w", name, err))
		}
	}
	return errors.Join(errs...)
}
