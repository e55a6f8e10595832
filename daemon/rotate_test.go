package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/warren-cni/warren/pkg/agentapi"
	"github.com/warren-cni/warren/pkg/cluster"
	"github.com/warren-cni/warren/pkg/keyproof"
	"github.com/warren-cni/warren/pkg/kube"
	"github.com/warren-cni/warren/pkg/wgdevice"
)

// testNotice is how long a next key is published in these tests.
const testNotice = 5 * time.Second

// rotated is a rotator whose steps a test makes, with what its Node says.
type rotated struct {
	*rotator
	t     *testing.T
	node  map[string]string
	woken chan struct{}
}

// newRotated starts a daemon's rotator on the keys in a directory.
func newRotated(t *testing.T, dir string, o rotation) *rotated {
	t.Helper()
	keys, err := wgdevice.OpenKeys(dir)
	if err != nil {
		t.Fatal(err)
	}
	r := &rotated{t: t, node: map[string]string{}, woken: make(chan struct{}, 100)}
	r.rotator = &rotator{
		options: o, encrypted: true, node: "node-1", keys: keys, clock: time.Now, log: slog.New(slog.DiscardHandler),
		wake: func() { r.woken <- struct{}{} },
	}
	return r
}

// step is what the daemon's step does with the keys: it returns whether there was anything to do, and the key that the device gets.
func (r *rotated) step() (changed bool, key wgdevice.Key) {
	r.t.Helper()
	changed, key = r.advance(), r.keys.Current()
	a, err := r.annotations(cluster.Node{Name: "node-1", UID: "uid-1"})
	if err != nil {
		r.t.Fatal(err)
	}
	maps.Copy(r.node, a)
	r.published(a)
	return changed, key
}

// said returns the keys that the Node says, after it checked their proofs.
func (r *rotated) said() publicKeys {
	r.t.Helper()
	var said publicKeys
	for _, what := range []struct {
		into       *string
		key, proof string
	}{
		{&said.current, kube.AnnotationPublicKey, kube.AnnotationKeyProof},
		{&said.next, kube.AnnotationNextPublicKey, kube.AnnotationNextKeyProof},
	} {
		*what.into = r.node[what.key]
		if *what.into == "" && r.node[what.proof] == "" {
			continue
		}
		key, errKey := base64.StdEncoding.DecodeString(r.node[what.key])
		proof, errProof := base64.StdEncoding.DecodeString(r.node[what.proof])
		if err := errors.Join(errKey, errProof); err != nil {
			r.t.Fatal(err)
		}
		if !keyproof.Verify([32]byte(key), "node-1", "uid-1", [64]byte(proof)) {
			r.t.Errorf("the proof of %s does not hold", *what.into)
		}
	}
	return said
}

// stage fails the test unless a change has come that far.
func (r *rotated) stage(want string) {
	r.t.Helper()
	if got := r.answer(); got.Stage != want || got.Problem != "" {
		r.t.Errorf("stage %q (problem %q), want %q", got.Stage, got.Problem, want)
	}
}

// steps is how often a step was asked for since the last call.
func (r *rotated) steps() int {
	synctest.Wait()
	n := len(r.woken)
	for range n {
		<-r.woken
	}
	return n
}

func TestRotation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRotated(t, t.TempDir(), rotation{notice: testNotice})
		if changed, _ := r.step(); !changed {
			t.Error("the first key was not to be published")
		}
		first, before := r.said(), maps.Clone(r.node)
		if changed, _ := r.step(); changed || !maps.Equal(r.node, before) || first.next != "" {
			t.Errorf("a step without a change says %v, before %v", r.node, before)
		}
		r.stage(agentapi.StageDone)

		if err := errors.Join(r.begin("test"), r.begin("test")); err != nil {
			t.Fatal(err)
		}
		r.stage(agentapi.StagePrepared)
		if n := r.steps(); n != 1 {
			t.Errorf("two requests asked for %d steps", n)
		}
		changed, key := r.step()
		announced := r.said()
		if !changed || publicKey(key) != first.current || announced.current != first.current || announced.next == "" {
			t.Errorf("announcing says %v and uses %s", announced, publicKey(key))
		}
		r.stage(agentapi.StageAnnounced)
		time.Sleep(testNotice - time.Millisecond)
		if changed, key = r.step(); changed || publicKey(key) != first.current || r.steps() != 0 {
			t.Error("the next key is used before the others had time to learn it")
		}
		time.Sleep(time.Millisecond)
		if r.steps() != 1 {
			t.Error("no step was asked for when the notice was over")
		}
		if !r.advance() || publicKey(r.keys.Current()) != announced.next {
			t.Error("the next key is not used when the notice is over")
		}
		r.stage(agentapi.StageSwitched)
		if changed, _ = r.step(); !changed || r.said() != (publicKeys{current: announced.next}) {
			t.Errorf("in the end the Node says %v, want %s alone", r.said(), announced.next)
		}
		r.stage(agentapi.StageDone)
		if changed, _ = r.step(); changed {
			t.Error("a change goes on after its end")
		}
	})
}

// TestRotationGoesOnAfterARestart ends the daemon at each step of a change: the next one ends the change, by the key that was announced.
func TestRotationGoesOnAfterARestart(t *testing.T) {
	for end, until := range []string{"prepared", "published", "committed", "applied and not published"} {
		t.Run(until, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := t.TempDir()
				r := newRotated(t, dir, rotation{notice: testNotice})
				r.step()
				first := r.said()
				if err := r.begin("test"); err != nil {
					t.Fatal(err)
				}
				next, _ := r.keys.Next()
				if end > 0 {
					r.step()
				}
				if end > 1 {
					time.Sleep(testNotice)
					r.advance()
				}
				node := r.node
				r = newRotated(t, dir, rotation{notice: testNotice})
				r.node = node
				if end < 2 {
					if _, key := r.step(); publicKey(key) != first.current || r.said() != (publicKeys{first.current, publicKey(next)}) {
						t.Errorf("after the restart %s is in use and the Node says %v", publicKey(key), r.said())
					}
					time.Sleep(testNotice)
				}
				if _, key := r.step(); key.Public() != next.Public() || r.said() != (publicKeys{current: publicKey(next)}) {
					t.Errorf("in the end %s is in use and the Node says %v, want %s", publicKey(key), r.said(), publicKey(next))
				}
				r.stage(agentapi.StageDone)
			})
		})
	}
}

// TestProofsStay has a daemon restart: what the Node says already is not written again, unless it does not hold.
func TestProofsStay(t *testing.T) {
	r := newRotated(t, t.TempDir(), rotation{notice: testNotice})
	r.step()
	key := r.keys.Current()
	proof := [64]byte(decoded(t, r.node[kube.AnnotationKeyProof]))
	self := cluster.Node{Name: "node-1", UID: "uid-1", WireGuard: &cluster.WireGuard{NodeKey: cluster.NodeKey{PublicKey: key.Public(), Proof: proof}}}
	restarted := &rotator{options: r.options, node: "node-1", keys: r.keys, clock: time.Now, log: r.log}
	if a, err := restarted.annotations(self); err != nil || a[kube.AnnotationKeyProof] != r.node[kube.AnnotationKeyProof] {
		t.Errorf("a proof that holds was replaced, or %v", err)
	}
	self.UID = "uid-2"
	a, err := restarted.annotations(self)
	if err != nil || !keyproof.Verify(key.Public(), "node-1", "uid-2", [64]byte(decoded(t, a[kube.AnnotationKeyProof]))) {
		t.Errorf("a Node that was made again has no proof that holds, or %v", err)
	}
}

// With encryption off there is no key to apply, at no step.
func TestNoKeyWithoutEncryption(t *testing.T) {
	r := newRotated(t, t.TempDir(), rotation{notice: testNotice})
	if !r.advance() {
		t.Error("with encryption the first key is not to be applied")
	}
	r.encrypted = false
	if r.advance() {
		t.Error("with encryption off there is a key to apply")
	}
}

// decoded is what a text in base64 holds.
func decoded(t *testing.T, text string) []byte {
	t.Helper()
	raw, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

func TestRotationThatCannotBegin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		r := newRotated(t, dir, rotation{notice: testNotice})
		r.step()
		first := r.said()
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		response := r.handle(agentapi.Rotate{Start: true})
		if response.Error == nil || !strings.Contains(response.Error.Message, "the old key stays in use") {
			t.Errorf("the operator is told %+v", response)
		}
		if len(r.problems()) > 0 {
			t.Errorf("what only the operator wanted is a problem: %v", r.problems())
		}

		r.owed = true // as after the clock was set back
		r.look(time.Time{})
		problems := r.problems()
		if len(problems) != 1 || problems[0].Code != rotationCode || !strings.Contains(problems[0].Message, dir) || r.steps() != 1 {
			t.Fatalf("problems: %v", problems)
		}
		if changed, key := r.step(); changed || publicKey(key) != first.current {
			t.Error("the key changed")
		}
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		r.look(time.Time{})
		if _, ok := r.keys.Next(); ok {
			t.Error("it was tried again at once")
		}
		time.Sleep(retryRotation)
		r.look(time.Time{})
		if _, ok := r.keys.Next(); !ok || len(r.problems()) > 0 {
			t.Errorf("it was not tried again: %v", r.problems())
		}
	})
}

func TestRotationByAge(t *testing.T) {
	const every = 10 * time.Hour
	synctest.Test(t, func(t *testing.T) {
		moments := map[time.Duration]bool{}
		for i := range 20 {
			r := newRotated(t, t.TempDir(), rotation{every: every, notice: testNotice})
			r.rotator.node = fmt.Sprintf("node-%d", i)
			made := r.keys.Made()
			early, late := made.Add(every-every/rotationSpread-time.Second), made.Add(every)
			if r.isOld(early) || !r.isOld(late) {
				t.Errorf("%s changes its key at other times than within the last tenth", r.rotator.node)
			}
			for at := early; ; at = at.Add(time.Minute) {
				if r.isOld(at) {
					moments[at.Sub(made)] = true
					break
				}
			}
			if r.isOld(made.Add(-time.Minute)) || !r.isOld(made.Add(-2*time.Hour)) {
				t.Error("a key of a time to come is not taken for what it is")
			}
			r.options.every = 0
			if r.isOld(late) {
				t.Error("a key changes that never shall")
			}
		}
		if len(moments) < 10 {
			t.Errorf("20 nodes change their keys at %d moments", len(moments))
		}
	})
}

func TestRotationAfterTheClockWasSetBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRotated(t, t.TempDir(), rotation{notice: testNotice})
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		asked := 0
		go r.run(ctx, func(context.Context) (time.Time, error) {
			asked++
			if asked == 1 {
				return time.Time{}, errors.New("the tunnel does not answer yet")
			}
			return time.Now().Add(time.Hour), nil // a handshake of before the daemon started
		})
		time.Sleep(10 * lookEvery)
		if synctest.Wait(); asked > 0 || r.steps() > 0 {
			t.Error("the tunnel was asked before it was set up")
		}
		r.step()
		time.Sleep(2 * lookEvery)
		if r.steps() != 1 {
			t.Error("a handshake in the future began no change")
		}
		r.step()
		time.Sleep(testNotice)
		r.step()
		r.steps()
		time.Sleep(10 * lookEvery)
		if r.steps() > 0 || asked != 2 {
			t.Errorf("asked %d times", asked)
		}
		r.stage(agentapi.StageDone)
	})
}

func TestSetback(t *testing.T) {
	const second, hour = time.Second, time.Hour
	for name, test := range map[string]struct {
		ahead []time.Duration
		want  []bool
	}{
		"steady":                        {[]time.Duration{0, 0, 0}, []bool{false, false, false}},
		"an hour back":                  {[]time.Duration{0, -hour, -hour, -hour}, []bool{false, true, false, false}},
		"an hour ahead, then right":     {[]time.Duration{0, hour, hour, 0, 0}, []bool{false, false, false, true, false}},
		"an hour behind, then right":    {[]time.Duration{0, -hour, 0, 0}, []bool{false, true, false, false}},
		"twice":                         {[]time.Duration{0, -hour, -2 * hour}, []bool{false, true, true}},
		"a leap second":                 {[]time.Duration{0, -second, -second}, []bool{false, false, false}},
		"little by little":              {[]time.Duration{0, -2 * second, -4 * second, -6 * second, -8 * second}, []bool{false, false, false, true, false}},
		"ahead after the machine slept": {[]time.Duration{0, 8 * hour, 8 * hour}, []bool{false, false, false}},
	} {
		t.Run(name, func(t *testing.T) {
			var s setback
			var got []bool
			for _, ahead := range test.ahead {
				got = append(got, s.differs(ahead))
			}
			if !slices.Equal(got, test.want) {
				t.Errorf("%v for %v, want %v", got, test.ahead, test.want)
			}
		})
	}
	var s setback
	for range 3 {
		if s.back(time.Now()) {
			t.Error("this machine's clock was set back")
		}
	}
}

func TestRotationOptions(t *testing.T) {
	for o, valid := range map[rotation]bool{
		{0, 5 * time.Second}:           true,
		{time.Hour, 0}:                 true,
		{time.Minute, 5 * time.Second}: false,
		{-time.Hour, 5 * time.Second}:  false,
		{0, -time.Second}:              false,
		{0, 2 * time.Hour}:             false,
	} {
		if err := o.validate(); (err == nil) != valid {
			t.Errorf("%+v: %v", o, err)
		}
	}
}

func TestRotateKeyCommand(t *testing.T) {
	var output strings.Builder
	stages := []string{
		agentapi.StagePrepared, agentapi.StagePrepared, agentapi.StageAnnounced, "", agentapi.StageSwitched, agentapi.StageDone,
	}
	synctest.Test(t, func(t *testing.T) {
		starts := 0
		ask := func(start bool) (agentapi.Rotation, error) {
			stage := stages[0]
			stages = stages[1:]
			if start {
				starts++
			}
			if stage == "" {
				return agentapi.Rotation{}, errors.New("the daemon restarts")
			}
			return agentapi.Rotation{Stage: stage, PublicKey: "K1", NextPublicKey: "K2"}, nil
		}
		if err := changeKey(t.Context(), &output, true, ask); err != nil || starts != 1 || len(stages) > 0 {
			t.Errorf("%v after %d starts", err, starts)
		}
	})
	const want = `key in use  K1
next key    K2
prepared    the next key is written; it is being published
announced   the next key is published; the other nodes learn it
switched    the next key is in use; it is being published as such
done        the next key is in use and published, the old one is gone
`
	if output.String() != want {
		t.Errorf("output:\n%s\nwant:\n%s", output.String(), want)
	}

	stuck := func(bool) (agentapi.Rotation, error) {
		return agentapi.Rotation{Stage: agentapi.StageAnnounced, PublicKey: "K1", NextPublicKey: "K2", Problem: "no room on the disk"}, nil
	}
	output.Reset()
	if err := changeKey(t.Context(), &output, false, stuck); err != nil || strings.Count(output.String(), "\n") != 2 {
		t.Errorf("without --wait: %v, %s", err, output.String())
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := changeKey(ctx, &output, true, stuck); err == nil || !strings.Contains(err.Error(), "no room on the disk") {
			t.Errorf("a change that does not go on: %v", err)
		}
	})
	if response := (&rotator{}).handle(agentapi.Rotate{Start: true}); response.Error == nil || !strings.Contains(response.Error.Message, "--encryption off") {
		t.Errorf("without encryption: %+v", response)
	}
}
