package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/rest"

	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/cniconf"
	"github.com/warren-cni/warren/pkg/conntrack"
	"github.com/warren-cni/warren/pkg/firewall"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/netfilter"
	"github.com/warren-cni/warren/pkg/nflog"
	"github.com/warren-cni/warren/pkg/nodenet"
	"github.com/warren-cni/warren/pkg/preflight"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// admissionPatience bounds the wait for each answer of the API server.
const admissionPatience = 3 * time.Second

// reader reads what preflight judges from the node, in the network namespace of the calling thread.
type reader struct {
	options doctorOptions
	// proc is /proc outside of tests, tun the device of TUN links.
	proc, tun string
	// connections and packetLog try whether the kernel answers about connections, and gives packets that are logged.
	connections func(context.Context) error
	packetLog   func() error
}

func newReader(o doctorOptions) reader {
	return reader{options: o, proc: "/proc", tun: "/dev/net/tun", connections: tryConnections, packetLog: tryPacketLog}
}

// read reads everything. What cannot be read is so noted.
func (r reader) read(ctx context.Context) preflight.Facts {
	facts := preflight.Facts{
		Kernel:         preflight.Read(release()),
		WireGuard:      preflight.Read(wgdevice.KernelHas()),
		TUN:            preflight.Read(r.hasTUN()),
		Forwarding:     preflight.Read(nodenet.Forwarding(r.options.sysctlDir)),
		Advertised:     preflight.Read(nodenet.Advertised(r.options.sysctlDir)),
		Links:          preflight.Read(nodenet.Links()),
		Routes:         preflight.Read(nodenet.Routes()),
		Sockets:        preflight.Read(r.sockets(ctx)),
		IPVS:           preflight.Read(hasIPVS()),
		Ahead:          preflight.Read(r.ahead()),
		Programs:       preflight.Read(r.programs()),
		Networkd:       preflight.Read(r.networkd()),
		NetworkManager: preflight.Read(r.networkManager()),
		UFW:            preflight.Read(r.ufw()),
		Firewalld:      preflight.Read(r.firewalld()),
		Directories:    preflight.Read(r.directories()),
		Admission:      preflight.Read(r.admission(ctx)),
	}
	backend, filter, err := firewall.Look(ctx)
	facts.Filter = preflight.Read(filter, err)
	if backend == "" {
		facts.Lacks.Err = err
		return facts
	}
	facts.Lacks = preflight.Read(r.tryOut(ctx, backend))
	return facts
}

// release is the kernel's.
func release() (string, error) {
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return "", fmt.Errorf("reading the kernel's release: %w", err)
	}
	return unix.ByteSliceToString(name.Release[:]), nil
}

// hasTUN looks for the TUN driver in the list of drivers, where a container without the device sees it, too, and else opens the
// device, which loads the driver.
func (r reader) hasTUN() (bool, error) {
	misc, err := os.ReadFile(filepath.Join(r.proc, "misc"))
	if err == nil && slices.Contains(strings.Fields(string(misc)), "tun") {
		return true, nil
	}
	device, err := os.OpenFile(r.tun, os.O_RDWR, 0)
	switch {
	case err == nil:
		return true, device.Close()
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENXIO):
		return false, nil
	default:
		return false, fmt.Errorf("looking for TUN devices: %w", err)
	}
}

// tryOut tries rules, sets and the kernel's answers about connections and logged packets, apart from the node's own.
func (r reader) tryOut(ctx context.Context, backend string) ([]preflight.Lack, error) {
	var found []preflight.Lack
	err := nodenet.Apart(func() error {
		var err error
		found, err = firewall.Try(ctx, backend)
		if connErr := r.connections(ctx); connErr != nil {
			found = append(found, preflight.Lack{Feature: "connection tracking over netlink", Module: "nf_conntrack_netlink", Err: connErr})
		}
		if logErr := r.packetLog(); logErr != nil {
			found = append(found, preflight.Lack{Feature: "packet log over netlink", Module: "nfnetlink_log", Err: logErr})
		}
		return err
	})
	return found, err
}

// tryConnections lists connections.
func tryConnections(ctx context.Context) error {
	_, err := conntrack.SweepAll(ctx, func(conntrack.Flow) bool { return true })
	return err
}

// tryPacketLog takes part in the packet log.
func tryPacketLog() error {
	log, err := nflog.Open(netfilter.LogGroup)
	if err != nil {
		return err
	}
	log.Close()
	return nil
}

// sockets are those on the tunnel's port that are not Warren's own.
func (r reader) sockets(ctx context.Context) ([]preflight.Socket, error) {
	found, err := nodenet.Sockets(r.options.port, r.proc)
	if err != nil || len(found) == 0 {
		return nil, err
	}
	own, err := wgdevice.Listens(ctx, r.options.port)
	switch {
	case own:
		return nil, nil
	case err != nil:
		return nil, fmt.Errorf("UDP port %d is in use, and whether by Warren's own tunnel cannot be told: %w", r.options.port, err)
	default:
		return found, nil
	}
}

// hasIPVS says whether kube-proxy goes round the packet filter.
func hasIPVS() (bool, error) {
	err := nodenet.CheckServices()
	if errors.Is(err, nodenet.ErrIPVS) {
		return true, nil
	}
	return false, err
}

// ahead are the configurations that the runtime reads before Warren's.
func (r reader) ahead() ([]preflight.Ahead, error) {
	files, err := cniconf.AheadOf(r.options.cniConfDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var found []preflight.Ahead
	for _, f := range files {
		found = append(found, preflight.Ahead(f))
	}
	return found, err
}

// errInContainer says that the processes that are seen are not the node's.
var errInContainer = errors.New("a container with a PID namespace of its own sees no other programs of the node")

// inContainer says whether this is a container of Warren's image, with a PID namespace and a file system of its own.
func (r reader) inContainer() (bool, error) {
	first, err := os.ReadFile(filepath.Join(r.proc, "1/comm"))
	if err != nil {
		return false, fmt.Errorf("looking for programs: %w", err)
	}
	return strings.TrimSpace(string(first)) == "warrend", nil
}

// programs are the names of the node's processes.
func (r reader) programs() ([]string, error) {
	inside, err := r.inContainer()
	if err != nil {
		return nil, err
	}
	if inside {
		return nil, errInContainer
	}
	files, err := filepath.Glob(filepath.Join(r.proc, "[0-9]*/comm"))
	var names []string
	for _, file := range files {
		if name, readErr := os.ReadFile(file); readErr == nil { // it may have ended
			names = append(names, strings.TrimSpace(string(name)))
		}
	}
	slices.Sort(names)
	return slices.Compact(names), err
}

// networkd reads the configuration of systemd-networkd (networkd.conf(5)): the first main file, and then all drop-ins by name, of which
// the first directory's counts where several have one.
func (r reader) networkd() ([]string, error) {
	roots := []string{"etc/systemd", "run/systemd", "usr/local/lib/systemd", "usr/lib/systemd"}
	var files []string
	dropIns := map[string]string{}
	for _, root := range roots {
		main := r.host(root, "networkd.conf")
		if _, err := os.Stat(main); err == nil && len(files) == 0 {
			files = append(files, main)
		}
		found, err := filepath.Glob(r.host(root, "networkd.conf.d/*.conf"))
		if err != nil {
			return nil, err
		}
		for _, file := range found {
			if dropIns[filepath.Base(file)] == "" {
				dropIns[filepath.Base(file)] = file
			}
		}
	}
	return r.texts(append(files, byName(dropIns)...))
}

// networkManager reads the configuration of NetworkManager (NetworkManager.conf(5)): the directories of the system before the main file
// and those of the administrator after it, each by name, and not what one of a later directory shadows.
func (r reader) networkManager() ([]string, error) {
	var before, after []string
	shadowed := map[string]bool{}
	for _, root := range []string{"etc/NetworkManager", "run/NetworkManager", "usr/lib/NetworkManager"} {
		found, err := filepath.Glob(r.host(root, "conf.d/*.conf"))
		if err != nil {
			return nil, err
		}
		var files []string
		for _, file := range found { // sorted
			if name := filepath.Base(file); !shadowed[name] {
				shadowed[name] = true
				files = append(files, file)
			}
		}
		if root == "etc/NetworkManager" {
			after = files
		} else {
			before = append(files, before...)
		}
	}
	return r.texts(slices.Concat(before, []string{r.host("etc/NetworkManager", "NetworkManager.conf")}, after))
}

// errNoFiles says what cannot be told without the node's files.
var errNoFiles = errors.New("a container does not see what the node's firewall was told to let pass: run warrend doctor on the node itself")

// seesFiles is an error where the files that are seen are not the node's.
func (r reader) seesFiles() error {
	inside, err := r.inContainer()
	if inside {
		return errNoFiles
	}
	return err
}

// ufw reads the defaults of ufw and the rules that its user has added (ufw-framework(8)).
func (r reader) ufw() ([]string, error) {
	if err := r.seesFiles(); err != nil {
		return nil, err
	}
	return r.texts([]string{r.host("etc/default", "ufw"), r.host("etc/ufw", "user.rules"), r.host("etc/ufw", "user6.rules")})
}

// firewalld reads the zones of firewalld that a remedy changes; what the administrator has changed of them is in /etc (firewalld.dirs(5)).
func (r reader) firewalld() (preflight.Zones, error) {
	if err := r.seesFiles(); err != nil {
		return preflight.Zones{}, err
	}
	text := func(name string) (string, error) {
		texts, err := r.texts([]string{r.host("etc/firewalld", name)})
		return strings.Join(texts, ""), err
	}
	standard := "public"
	config, err := text("firewalld.conf")
	for line := range strings.Lines(config) {
		if name, is := strings.CutPrefix(strings.TrimSpace(line), "DefaultZone="); is {
			standard = name
		}
	}
	trusted, trustedErr := text("zones/trusted.xml")
	other, otherErr := text(filepath.Join("zones", filepath.Base(standard)+".xml"))
	return preflight.Zones{Trusted: trusted, Default: other}, errors.Join(err, trustedErr, otherErr)
}

// host is the path of a file of the node's, which a container sees by the node's first process if it sees that.
func (r reader) host(dir, name string) string { return filepath.Join(r.proc, "1/root", dir, name) }

// texts reads files, but for those that are not there.
func (r reader) texts(files []string) ([]string, error) {
	if _, err := os.Stat(r.host("etc", "")); err != nil {
		return nil, fmt.Errorf("reading the node's configuration: %w", err)
	}
	var texts []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the node's configuration: %w", err)
		}
		texts = append(texts, string(text))
	}
	return texts, nil
}

// byName returns files sorted by their keys.
func byName(files map[string]string) []string {
	var sorted []string
	for _, file := range files {
		sorted = append(sorted, file)
	}
	slices.SortFunc(sorted, func(a, b string) int { return strings.Compare(path.Base(a), path.Base(b)) })
	return sorted
}

// directories looks at those that Warren writes to.
func (r reader) directories() ([]preflight.Directory, error) {
	inside, err := r.inContainer()
	if err != nil {
		return nil, err
	}
	o := r.options
	var found []preflight.Directory
	var errs []error
	for _, d := range []preflight.Directory{
		{Path: o.cniBinDir, Flag: "--cni-bin-dir", ForBinaries: true},
		{Path: o.cniConfDir, Flag: "--cni-conf-dir"},
		{Path: o.runDir, Flag: "--run-dir", ForBoot: true},
		{Path: o.stateDir, Flag: "--state-dir"},
	} {
		if inside && sameFileSystem(d.Path, "/") {
			errs = append(errs, fmt.Errorf("the node's %s is not mounted in this container", d.Path))
			continue
		}
		found = append(found, lookAt(d))
	}
	return found, errors.Join(errs...)
}

// sameFileSystem says whether a path, or what is there of it, is on the file system of another.
func sameFileSystem(name, as string) bool {
	var one, other unix.Stat_t
	return unix.Stat(existing(name), &one) == nil && unix.Stat(as, &other) == nil && one.Dev == other.Dev
}

// existing returns the path, or where there is nothing yet, that of the directory in which it would be made.
func existing(name string) string {
	for name != filepath.Dir(name) {
		if _, err := os.Stat(name); !errors.Is(err, fs.ErrNotExist) {
			break
		}
		name = filepath.Dir(name)
	}
	return name
}

// lookAt looks at a directory, or where it is not there yet, at the one that it would be made in.
func lookAt(d preflight.Directory) preflight.Directory {
	dir := existing(d.Path)
	info, err := os.Stat(dir)
	if err == nil && !info.IsDir() {
		err = &fs.PathError{Op: "open", Path: dir, Err: unix.ENOTDIR}
	}
	var mounted unix.Statfs_t
	if err == nil {
		err = unix.Statfs(dir, &mounted)
	}
	if err == nil {
		if err = unix.Access(dir, unix.W_OK|unix.X_OK); err != nil {
			err = &fs.PathError{Op: "write", Path: dir, Err: err}
		}
	}
	if err != nil {
		d.Problem = err.Error()
		return d
	}
	d.Memory = mounted.Type == unix.TMPFS_MAGIC || mounted.Type == unix.RAMFS_MAGIC
	d.NoExec = mounted.Flags&unix.ST_NOEXEC != 0
	return d
}

// admission asks the API server for the admission policies.
func (r reader) admission(ctx context.Context) ([]cluster.Problem, error) {
	config, err := restConfig(r.options.kubeconfig)
	if errors.Is(err, rest.ErrNotInCluster) {
		return nil, errors.New("no API server is known: say --kubeconfig FILE")
	}
	if err != nil {
		return nil, err
	}
	config.Timeout = admissionPatience
	return kube.Unconfined(ctx, config)
}
