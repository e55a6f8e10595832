// Package agentapi is the protocol between the CNI plugin (and the operator's command) and the daemon: one request and
// one response, each a line of JSON, over a unix socket that only root may open.
package agentapi

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"time"
)

// Version is the protocol's version. It changes with what one side would misunderstand that does not know of it; a field or an
// operation that the other may do without is no new version.
//
// Each side also speaks the version before, if there was one, because an update replaces the plugin first and then the daemon: a daemon
// answers in the version that it is asked in, and a client whose version is refused asks again in the daemon's. Every other version is
// refused with a *VersionError.
const Version = 1

// versions are those that a program speaks.
type versions struct{ oldest, newest int }

// spoken returns the versions of this program.
func spoken() versions { return versions{max(1, Version-1), Version} }

// speaks says whether a version is among them.
func (v versions) speaks(version int) bool { return v.oldest <= version && version <= v.newest }

// VersionError says that client and daemon have no version in common.
type VersionError struct {
	// Client and Daemon are the versions that they speak.
	Client, Daemon int
}

// Error says which of both is to be updated.
func (e *VersionError) Error() string {
	if e.Client < e.Daemon {
		return fmt.Sprintf("the program that asks is too old for the daemon of this node: it speaks version %d of their protocol, the daemon version %d; "+
			"update the program (for the plugin, delete the daemon's pod: it installs its own plugin when it starts)", e.Client, e.Daemon)
	}
	return fmt.Sprintf("the daemon of this node is too old for the program that asks: it speaks version %d of their protocol, the program version %d; "+
		"update the daemon (roll out the DaemonSet warren)", e.Daemon, e.Client)
}

// Operations of a Request.
const (
	// OpAttach asks the daemon to put the pod's policies into the kernel and then to open the start gate for its addresses.
	OpAttach = "attach"
	// OpCheck asks whether the gate is open for the pod's addresses, and its policies and the guards stand in the kernel.
	OpCheck = "check"
	// OpReady asks whether the daemon can serve OpAttach, and whether all is well with what stands; the plugin's STATUS is made of it.
	OpReady = "ready"
	// OpReleased says that attachments were released, and asks the daemon to delete their links and their connections within a second.
	OpReleased = "released"
	// OpRemoveChained asks the daemon to remove what other plugins of the conflist have made for containers that the runtime knows no more.
	OpRemoveChained = "remove-chained"
	// OpStatus asks for a Status.
	OpStatus = "status"
	// OpExplain asks what the policies decide about a connection, and why.
	OpExplain = "explain"
	// OpRotate asks for a change of the node's WireGuard key, or how far one has come.
	OpRotate = "rotate"
	// OpVerify asks for what is planned of the mesh, and where the kernel differs from it.
	OpVerify = "verify"
)

// Request is what a client sends.
type Request struct {
	Version int    `json:"version"`
	Op      string `json:"op"`
	// Pod is set for OpAttach and OpCheck.
	Pod *Pod `json:"pod,omitempty"`
	// Containers are set for OpRemoveChained.
	Containers []string `json:"containers,omitempty"`
	// Explain is set for OpExplain.
	Explain *Explain `json:"explain,omitempty"`
	// Rotate is set for OpRotate.
	Rotate *Rotate `json:"rotate,omitempty"`
}

// Rotate is a question about the change of the node's key.
type Rotate struct {
	// Start begins a change, unless one is under way.
	Start bool `json:"start,omitempty"`
}

// Explain is a question about a connection, in the words of the operator.
type Explain struct {
	// From and To are each a pod's namespace/name, or an address; To may be a Service's svc/namespace/name too.
	From string `json:"from"`
	To   string `json:"to"`
	// Port is a number or the name of a port of the destination, either with /protocol or without. Empty it stands for ICMP, or
	// for all ports of a Service.
	Port string `json:"port,omitempty"`
}

// Pod identifies a pod's interface.
type Pod struct {
	ContainerID string       `json:"containerID"`
	Interface   string       `json:"interface"`
	Namespace   string       `json:"namespace"`
	Name        string       `json:"name"`
	UID         string       `json:"uid,omitempty"`
	Addresses   []netip.Addr `json:"addresses"`
}

// Response is what the daemon answers.
type Response struct {
	Version int    `json:"version"`
	Error   *Error `json:"error,omitempty"`
	// Limited answers OpReady where pods can be attached: what those that run may lack. Empty where all is well.
	Limited string `json:"limited,omitempty"`
	// Status answers OpStatus with a Status; AskStatus reads it. It is not read with the response, because to learn what a Status is made of
	// would cost the plugin, which is started anew for each pod, a good part of its time.
	Status json.RawMessage `json:"status,omitempty"`
	// Explanation is as `warrend explain -o json` prints it. Daemon and command are one program; the plugin, which links this
	// package too, stays free of what it is made of.
	Explanation json.RawMessage `json:"explanation,omitempty"`
	// Rotation answers OpRotate.
	Rotation *Rotation `json:"rotation,omitempty"`
	// Verification is what `warrend verify` needs of the daemon. It is theirs alone, like Explanation.
	Verification json.RawMessage `json:"verification,omitempty"`
}

// Error is a refusal. Code is a CNI error code (spec section "Error"), 11 for "try again later".
type Error struct {
	Code    uint   `json:"code"`
	Message string `json:"message"`
}

// Error returns the message.
func (e *Error) Error() string { return e.Message }

// Status is what `warrend status` shows.
type Status struct {
	Node       string     `json:"node"`
	Version    string     `json:"version"`
	PodCIDRs   []string   `json:"podCIDRs"`
	Ready      bool       `json:"ready"`
	Encryption Encryption `json:"encryption"`
	Peers      []Peer     `json:"peers"`
	Policies   Policies   `json:"policies"`
	// Notes are what one has to know and nothing to mend.
	Notes []string `json:"notes,omitempty"`
	// Problems are sorted; empty on a healthy node.
	Problems []Problem `json:"problems"`
}

// Encryption says what is encrypted and what is not.
type Encryption struct {
	// Mode is "kernel", "userspace", "off", or "unknown" while the tunnel does not answer.
	Mode      string `json:"mode"`
	PublicKey string `json:"publicKey,omitempty"`
	Port      uint16 `json:"port,omitempty"`
	MTU       int    `json:"mtu"`
	// Guard says what the guards against plaintext cover: "cluster-cidr", "known nodes only", or "none" where Mode is "off".
	Guard string `json:"guard"`
	// GuardStands says whether they were all in the kernel when the daemon applied its rules last; false until it has, and where that failed.
	GuardStands bool `json:"guardStands"`
	// NotCovered are the kinds of traffic that leave in clear in this mode.
	NotCovered []string `json:"notCovered"`
}

// Peer is a peer of the mesh as the device has it.
type Peer struct {
	Node          string    `json:"node"`
	PublicKey     string    `json:"publicKey"`
	Endpoint      string    `json:"endpoint"`
	AllowedIPs    []string  `json:"allowedIPs"`
	LastHandshake time.Time `json:"lastHandshake,omitzero"`
	ReceivedBytes int64     `json:"receivedBytes"`
	SentBytes     int64     `json:"sentBytes"`
}

// Policies counts what is programmed on the node.
type Policies struct {
	Policies  int       `json:"policies"`
	Pods      int       `json:"pods"`
	Isolated  int       `json:"isolatedPods"`
	Sets      int       `json:"sets"`
	Rules     int       `json:"rules"`
	LastApply time.Time `json:"lastApply,omitzero"`
}

// Problem is a cluster.Problem on the wire.
type Problem struct {
	Code    string `json:"code"`
	Object  string `json:"object"`
	Field   string `json:"field,omitempty"`
	Message string `json:"message"`
	Remedy  string `json:"remedy"`
	Owner   string `json:"owner,omitempty"`
}

// Stages of a Rotation, in their order.
const (
	// StagePrepared says that the next key is made and not published yet.
	StagePrepared = "prepared"
	// StageAnnounced says that the next key is published, so that the other nodes can learn it.
	StageAnnounced = "announced"
	// StageSwitched says that the new key is in use and not published as such yet.
	StageSwitched = "switched"
	// StageDone says that no change is under way.
	StageDone = "done"
)

// Rotation says how far the change of the node's key has come.
type Rotation struct {
	Node  string `json:"node"`
	Stage string `json:"stage"`
	// PublicKey is that of the key in use, NextPublicKey that of the key to come.
	PublicKey     string    `json:"publicKey"`
	NextPublicKey string    `json:"nextPublicKey,omitempty"`
	Made          time.Time `json:"made,omitzero"`
	// Problem says why the change does not go on; empty where it does.
	Problem string `json:"problem,omitempty"`
}
