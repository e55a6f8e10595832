package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"sync"
	"time"

	"github.com/spf13/pflag"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// rotationCode is the code of the problem that the node's key should change and cannot.
const rotationCode = "KeyRotationFailed"

// The times of a rotator.
const (
	// lookEvery is how often it looks at the clock and at the key's age.
	lookEvery = time.Second
	// retryRotation is how long it waits after a change that could not begin.
	retryRotation = time.Minute
	// leastRotation is the shortest --rotate-every.
	leastRotation = time.Hour
	// rotationSpread is the part of --rotate-every over which the nodes of a cluster that was made at once are spread.
	rotationSpread = 10
)

// rotation are the flags that decide when the node's key changes.
type rotation struct {
	every  time.Duration
	notice time.Duration
}

// add declares the flags.
func (o *rotation) add(f *pflag.FlagSet) {
	f.DurationVar(&o.every, "rotate-every", 0, "change the node's WireGuard key when it is that old (0: never; at least 1h); see warrend rotate-key")
	f.DurationVar(&o.notice, "rotate-notice", 5*time.Second, "how long the next key is published before it is used: the time that news takes to all nodes")
}

// validate checks the flags.
func (o *rotation) validate() error {
	if o.every != 0 && o.every < leastRotation {
		return fmt.Errorf("--rotate-every=%v: say 0 (never) or at least %v", o.every, leastRotation)
	}
	if o.notice < 0 || o.notice > time.Hour {
		return fmt.Errorf("--rotate-notice=%v: say 0s to 1h", o.notice)
	}
	return nil
}

// rotator changes the node's key without breaking a connection:
//
//  1. prepared: the next key is in its file. A daemon that starts with such a file goes on with it.
//  2. announced: the next key is published beside the one in use, for long enough that the other nodes know both.
//  3. switched: the file has taken the place of the key in use, and the device gets the key: sessions that stand still receive, and what is
//     sent starts new ones, by which the other nodes notice (see follower).
//  4. done: the new key is published as the one in use, and no next one.
//
// Steps 2 to 4 are those of the daemon's loop, which asks advance what to apply and annotations what to publish. A change begins when
// the operator asks for it, when the key is old, and when the clock was set back: WireGuard refuses handshakes that are older than the
// latest it has seen of a key, so a node whose clock stood ahead could start none until the time that it showed has come.
type rotator struct {
	options rotation
	// encrypted is false with --encryption off.
	encrypted bool
	node      string
	keys      *wgdevice.Keys
	clock     func() time.Time
	log       *slog.Logger
	// wake starts a step of the daemon.
	wake func()

	mu sync.Mutex
	// told are the keys that the Node was given last, and announced is since when they have a next one.
	told      publicKeys
	announced time.Time
	proofs    map[proofOf][64]byte
	err       error
	retry     time.Time
	// owed says that the clock was set back and the change for that has not begun.
	owed bool
	set  setback
}

// publicKeys are those of the key in use and of the next one, in base64.
type publicKeys struct{ current, next string }

// proofOf is what a proof is of.
type proofOf struct {
	key [32]byte
	uid string
}

// advance puts the next key in use when the other nodes have had the time to learn it. It says whether there is something of the keys that
// the last step did not apply and publish. Each step calls it before it asks for the key.
func (r *rotator) advance() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.announced.IsZero() && r.clock().Sub(r.announced) >= r.options.notice {
		if r.err = r.keys.Commit(); r.err == nil {
			r.announced = time.Time{}
			r.log.Info("changed the key: the next one is in use", "public_key", publicKey(r.keys.Current()))
		}
	}
	return r.encrypted && r.now() != r.told // with encryption off no device has a key, and the Node says none
}

// now returns the keys as they are in their files.
func (r *rotator) now() publicKeys {
	k := publicKeys{current: publicKey(r.keys.Current())}
	if next, ok := r.keys.Next(); ok {
		k.next = publicKey(next)
	}
	return k
}

// annotations returns what the own Node is to say of its keys; what is empty, it is not to say.
func (r *rotator) annotations(self cluster.Node) (map[string]string, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	a := map[string]string{kube.AnnotationNextPublicKey: "", kube.AnnotationNextKeyProof: ""}
	had := r.proofs
	r.proofs = map[proofOf][64]byte{}
	say := func(key wgdevice.Key, keyName, proofName string) error {
		what := proofOf{key.Public(), self.UID}
		proof, err := r.prove(key, self, had[what])
		r.proofs[what] = proof
		a[keyName], a[proofName] = publicKey(key), base64.StdEncoding.EncodeToString(proof[:])
		return err
	}
	err := say(r.keys.Current(), kube.AnnotationPublicKey, kube.AnnotationKeyProof)
	if next, ok := r.keys.Next(); ok {
		err = errors.Join(err, say(next, kube.AnnotationNextPublicKey, kube.AnnotationNextKeyProof))
	}
	return a, err
}

// prove returns a proof of a key: the one that it had, or the one that the Node says already, so that nothing is written without need.
func (r *rotator) prove(key wgdevice.Key, self cluster.Node, had [64]byte) ([64]byte, error) {
	if had != ([64]byte{}) {
		return had, nil
	}
	var said []cluster.NodeKey
	if w := self.WireGuard; w != nil {
		said = append(said, w.NodeKey)
		if w.Next != nil {
			said = append(said, *w.Next)
		}
	}
	for _, k := range said {
		if k.PublicKey == key.Public() && keyproof.Verify(k.PublicKey, self.Name, self.UID, k.Proof) {
			return k.Proof, nil
		}
	}
	return key.Proof(self.Name, self.UID)
}

// published takes note of annotations that the own Node has been given.
func (r *rotator) published(annotations map[string]string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.told = publicKeys{annotations[kube.AnnotationPublicKey], annotations[kube.AnnotationNextPublicKey]}
	if r.told.next == "" || !r.announced.IsZero() {
		return
	}
	r.announced = r.clock()
	r.log.Info("changing the key: the next one is published", "next_public_key", r.told.next, "in_use_in", r.options.notice)
	time.AfterFunc(r.options.notice, r.wake)
}

// begin begins a change, unless one is under way.
func (r *rotator) begin(why string) error {
	_, underWay := r.keys.Next()
	if err := r.keys.Prepare(); err != nil {
		return err
	}
	r.mu.Lock()
	r.err, r.owed = nil, false
	r.mu.Unlock()
	if !underWay {
		r.log.Info("changing the key", "why", why)
		r.wake()
	}
	return nil
}

// run begins the changes that nobody asks for, until the context ends. latest returns the time of the latest handshake.
func (r *rotator) run(ctx context.Context, latest func(context.Context) (time.Time, error)) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	asked := false
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
		if !asked && r.isTold() { // by now the tunnel is set up
			handshake, err := latest(ctx)
			asked = err == nil
			r.look(handshake)
		} else {
			r.look(time.Time{})
		}
	}
}

// isTold says whether keys were published.
func (r *rotator) isTold() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.told != publicKeys{}
}

// look begins a change where it is time. A handshake later than now is one that was made before the clock was set back.
func (r *rotator) look(handshake time.Time) {
	r.mu.Lock()
	now := r.clock()
	r.owed = r.set.back(now) || now.Sub(handshake) < -setbackMargin || r.owed
	why := ""
	switch {
	case now.Before(r.retry):
	case r.owed:
		why = "the clock was set back"
	case r.isOld(now):
		why = "its age"
	}
	r.mu.Unlock()
	if why == "" {
		return
	}
	if err := r.begin(why); err != nil {
		r.mu.Lock()
		r.err, r.retry = err, now.Add(retryRotation)
		r.mu.Unlock()
		r.wake() // the next step tells the problem
	}
}

// isOld says whether the key in use has the age at which it changes. Nodes differ in it, so that not all change at once. A key of a
// time to come was made by a clock that was wrong.
func (r *rotator) isOld(now time.Time) bool {
	hash := fnv.New32a()
	_, _ = hash.Write([]byte(r.node)) // never fails
	early := r.options.every / rotationSpread / 1000 * time.Duration(hash.Sum32()%1000)
	age := now.Sub(r.keys.Made())
	return r.options.every > 0 && (age >= r.options.every-early || age < -leastRotation)
}

// problems returns why a change does not go on.
func (r *rotator) problems() []cluster.Problem {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.err == nil {
		return nil
	}
	return []cluster.Problem{applyProblem(rotationCode, "Node "+r.node, r.err,
		"the old key stays in use; mend what the message names, the daemon retries")}
}

// answer says how far a change has come.
func (r *rotator) answer() agentapi.Rotation {
	r.mu.Lock()
	defer r.mu.Unlock()
	keys := r.now()
	a := agentapi.Rotation{
		Node: r.node, Stage: agentapi.StageDone, PublicKey: keys.current, NextPublicKey: keys.next, Made: r.keys.Made(),
	}
	switch {
	case keys.next != "" && r.announced.IsZero():
		a.Stage = agentapi.StagePrepared
	case keys.next != "":
		a.Stage = agentapi.StageAnnounced
	case keys != r.told:
		a.Stage = agentapi.StageSwitched
	}
	if r.err != nil {
		a.Problem = r.err.Error()
	}
	return a
}

// setbackMargin is how far a clock may be set back without harm: handshakes are tried again for longer than that.
const setbackMargin = 5 * time.Second

// setback notices when the wall clock is set back against the monotonic one. Going slower, as a clock does that is corrected little by
// little, is nothing: a later time is then still a later one.
type setback struct {
	first time.Time
	// ahead is by how much the wall clock has gone ahead since first, at most.
	ahead time.Duration
}

// back says whether the wall clock was set back since the last call.
func (s *setback) back(now time.Time) bool {
	if s.first.IsZero() {
		s.first = now
	}
	return s.differs(now.Round(0).Sub(s.first.Round(0)) - now.Sub(s.first)) // Round takes the monotonic time away
}

// differs is back for the time by which the clocks differ.
func (s *setback) differs(ahead time.Duration) bool {
	if ahead < s.ahead-setbackMargin {
		s.ahead = ahead
		return true
	}
	s.ahead = max(s.ahead, ahead)
	return false
}
