package firewall

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"

	"github.com/coreos/go-iptables/iptables"

	"github.com/warren-cni/warren/pkg/netfilter"
)

// lockWait is how many seconds a program waits for the xtables lock before it gives up and the next Apply tries again: what needs
// no program, the sets, is not held up for longer.
const lockWait = 5

// execer finds and runs programs.
type execer interface {
	LookPath(file string) (string, error)
	// Run returns what the program wrote to its two outputs, also when it failed.
	Run(ctx context.Context, stdin, path string, args ...string) (stdout, stderr string, err error)
}

// jumper changes single rules: a go-iptables handle of one family.
type jumper interface {
	Insert(table, chain string, pos int, rulespec ...string) error
	Append(table, chain string, rulespec ...string) error
	Delete(table, chain string, rulespec ...string) error
}

// programs runs the real programs.
type programs struct{}

// LookPath implements execer.
func (programs) LookPath(file string) (string, error) { return exec.LookPath(file) }

// Run implements execer.
func (programs) Run(ctx context.Context, stdin, path string, args ...string) (stdout, stderr string, err error) {
	var out, errs bytes.Buffer
	cmd := exec.CommandContext(ctx, path, args...) //nolint:gosec // paths that LookPath found for names of ours
	cmd.Stdin = strings.NewReader(stdin)
	cmd.Stdout, cmd.Stderr = &out, &errs
	err = cmd.Run()
	return out.String(), errs.String(), err
}

// tools are the programs for one family.
type tools struct {
	exec          execer
	restore, save string
	jumps         jumper
}

// errWarned marks a change that a program made with a warning: what stands now may not be what was asked for.
var errWarned = errors.New("unexpected warning")

// failedLine finds the line of the input that a program complains about: "line 3 failed", "line 3: RULE_APPEND failed",
// "Error occurred at line: 3".
var failedLine = regexp.MustCompile(`\bline:? (\d+)`)

// ruleLine takes a rule of rendered input apart: chain, comment after the hash, and what the rule does.
var ruleLine = regexp.MustCompile(`^-A (\S+) (.*)-m comment --comment "\S+ ?([^"]*)" (.*)$`)

// suite is the programs of one backend.
type suite map[netfilter.Family]*tools

// findSuites finds the programs of both backends, of which one may be missing, but not the wanted one.
func findSuites(x execer, wanted string) (map[string]suite, error) {
	suites := map[string]suite{}
	var errs []error
	for _, backend := range []string{nft, legacy} {
		s, err := findSuite(x, backend)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		suites[backend] = s
	}
	if len(suites) == 0 || wanted != "" && suites[wanted] == nil {
		return nil, errors.Join(errs...)
	}
	return suites, nil
}

// findSuite finds the programs of one backend.
func findSuite(x execer, backend string) (suite, error) {
	s := suite{}
	for _, f := range netfilter.Families {
		t, err := findTools(x, f, backend)
		if err != nil {
			return nil, err
		}
		s[f] = t
	}
	return s, nil
}

// findTools finds the programs of one family and backend.
func findTools(x execer, f netfilter.Family, backend string) (*tools, error) {
	name, proto := "iptables-"+backend, iptables.ProtocolIPv4
	if f == netfilter.IPv6 {
		name, proto = "ip6tables-"+backend, iptables.ProtocolIPv6
	}
	t := &tools{exec: x}
	var jumps string
	for suffix, path := range map[string]*string{"": &jumps, "-restore": &t.restore, "-save": &t.save} {
		found, err := x.LookPath(name + suffix)
		if err != nil {
			return nil, fmt.Errorf("finding %s (install the package iptables): %w", name+suffix, err)
		}
		*path = found
	}
	handle, err := iptables.New(iptables.IPFamily(proto), iptables.Path(jumps), iptables.Timeout(lockWait))
	if err != nil {
		return nil, fmt.Errorf("asking %s for its version: %w", jumps, err)
	}
	t.jumps = handle
	return t, nil
}

// readAll returns the tables that stand, by name, as iptables-save writes them.
func (t *tools) readAll(ctx context.Context) (map[string]string, error) {
	saved, err := t.run(ctx, "", t.save)
	if err != nil {
		return nil, err
	}
	return tablesOf(saved), nil
}

// tablesOf divides the output of iptables-save by tables.
func tablesOf(saved string) map[string]string {
	tables := map[string]string{}
	for part := range strings.SplitSeq("\n"+saved, "\n*") {
		if name, rest, ok := strings.Cut(part, "\n"); ok && name != "" {
			tables[name] = rest
		}
	}
	return tables
}

// write makes the change that the rendered delta says: all of it or nothing.
func (t *tools) write(ctx context.Context, text string) error {
	_, err := t.run(ctx, text, t.restore, "--noflush", "-w", strconv.Itoa(lockWait))
	return err
}

// run runs a program. Words on its error output are a failure, whatever its status: iptables-restore leaves out a match
// that the kernel does not have with a warning and status 0, and a rule without its match may allow anything.
func (t *tools) run(ctx context.Context, stdin, path string, args ...string) (string, error) {
	stdout, stderr, err := t.exec.Run(ctx, stdin, path, args...)
	words := complaint(stderr)
	switch {
	case err != nil:
		return "", blame(stdin, stderr, fmt.Errorf("%w: %s", err, words))
	case words != "":
		return "", blame(stdin, stderr, fmt.Errorf("%w: %s", errWarned, words))
	case strings.Contains(stdout, "is incompatible, use 'nft' tool"):
		return "", errors.New("the table is incompatible: it has rules made by nft that iptables cannot read")
	}
	return stdout, nil
}

// refused says whether an error means that a program did not take its input as it is. Otherwise (somebody else holds the lock, it
// could not be run, it was killed) it may take the same input another time.
func refused(err error) bool {
	var exit *exec.ExitError
	return errors.Is(err, errWarned) || errors.As(err, &exit) && exit.Exited() && !locked(err)
}

// locked says whether an error means that a program gave up because somebody else held the lock all the time.
func locked(err error) bool {
	return err != nil && strings.Contains(err.Error(), "holding the xtables lock")
}

// complaint returns the lines of an error output that mean something, as one line.
func complaint(stderr string) string {
	var lines []string
	for line := range strings.Lines(stderr) {
		line = strings.TrimSpace(line)
		switch {
		case line == "", strings.HasPrefix(line, "Try `"):
		case strings.HasPrefix(line, "# Warning: ") && strings.Contains(line, "tables present, use"):
			// Rules of the other backend stand too. Nothing is wrong with ours.
		default:
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "; ")
}

// ruleError is an error that is about a rule of the input.
type ruleError struct {
	chain, comment, rule string
	err                  error
}

// Error implements error.
func (e *ruleError) Error() string {
	return fmt.Sprintf("rule %q in chain %s (%s): %v", e.comment, e.chain, e.rule, e.err)
}

// Unwrap returns what is said about the rule.
func (e *ruleError) Unwrap() error { return e.err }

// blame adds the rule of the input that an error output complains about, where it names one.
func blame(input, stderr string, err error) error {
	m := failedLine.FindStringSubmatch(stderr)
	if m == nil {
		return err
	}
	n, numberErr := strconv.Atoi(m[1])
	lines := strings.Split(input, "\n")
	if numberErr != nil || n < 1 || n > len(lines) {
		return err
	}
	rule := ruleLine.FindStringSubmatch(lines[n-1])
	if rule == nil {
		return err
	}
	return &ruleError{chain: rule[1], comment: rule[3], rule: rule[2] + rule[4], err: err}
}
