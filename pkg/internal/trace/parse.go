package trace

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Parse reads the text of one family.
func Parse(text string) (*Filter, error) {
	f := &Filter{sets: map[string]*set{}, chains: map[chainKey][]rule{}}
	table := ""
	for i, line := range strings.Split(text, "\n") {
		err := f.line(&table, line)
		if err != nil {
			return nil, fmt.Errorf("parsing line %d (%s): %w", i+1, line, err)
		}
	}
	return f, nil
}

// line reads one line; table is the one that COMMIT has not closed yet.
func (f *Filter) line(table *string, line string) error {
	words, err := split(line)
	if err != nil || len(words) == 0 {
		return err
	}
	switch first := words[0]; {
	case strings.HasPrefix(first, "*"):
		*table = first[1:]
	case first == "COMMIT":
		*table = ""
	case strings.HasPrefix(first, ":"):
		return f.declare(chainKey{*table, first[1:]}, words[1:])
	case first == "-A" && len(words) > 2:
		return f.rule(chainKey{*table, words[1]}, words[2:], line)
	case first == "create":
		return f.create(words[1:])
	case first == "add":
		return f.add(words[1:])
	case first == "hook":
		return f.hook(words[1:])
	default:
		return fmt.Errorf("%q is unknown", first)
	}
	return nil
}

func (f *Filter) declare(key chainKey, rest []string) error {
	if !slices.Equal(rest, []string{"-", "[0:0]"}) {
		return fmt.Errorf("%q does not declare a chain", rest)
	}
	if _, ok := f.chains[key]; ok {
		return fmt.Errorf("chain %s is there twice", key.name)
	}
	f.chains[key] = nil
	return nil
}

func (f *Filter) create(words []string) error {
	if len(words) != 4 || words[2] != "family" {
		return fmt.Errorf("%q does not create a set", words)
	}
	if !slices.Contains([]string{"hash:ip", "hash:net", "hash:ip,port"}, words[1]) {
		return fmt.Errorf("the set type %s is unknown", words[1])
	}
	if _, ok := f.sets[words[0]]; ok {
		return fmt.Errorf("set %s is there twice", words[0])
	}
	f.sets[words[0]] = &set{kind: words[1]}
	return nil
}

func (f *Filter) add(words []string) error {
	if len(words) != 2 || f.sets[words[0]] == nil {
		return fmt.Errorf("%q adds to no set", words)
	}
	s := f.sets[words[0]]
	address, port, hasPort := strings.Cut(words[1], ",")
	prefix, err := parsePrefix(address)
	if err != nil {
		return err
	}
	m := setMember{prefix: prefix}
	switch {
	case hasPort != (s.kind == "hash:ip,port"):
		return fmt.Errorf("%q is no member of a %s", words[1], s.kind)
	case s.kind != "hash:net" && !prefix.IsSingleIP(), prefix.Bits() == 0:
		return fmt.Errorf("the kernel refuses %s in a %s", prefix, s.kind)
	case hasPort:
		protocol, number, _ := strings.Cut(port, ":")
		n, portErr := strconv.ParseUint(number, 10, 16)
		if portErr != nil {
			return portErr
		}
		m.protocol, m.port = protocol, uint16(n)
	}
	if slices.Contains(s.members, m) {
		return fmt.Errorf("member %s is there twice", words[1])
	}
	s.members = append(s.members, m)
	return nil
}

// hook reads "-t TABLE -I|-A BUILTIN -m comment --comment warren -j CHAIN".
func (f *Filter) hook(words []string) error {
	if len(words) != 10 || words[0] != "-t" || (words[2] != "-I" && words[2] != "-A") ||
		!slices.Equal(words[4:9], []string{"-m", "comment", "--comment", "warren", "-j"}) {
		return fmt.Errorf("%q is no hook", words)
	}
	h := hook{table: words[1], builtIn: words[3], chain: words[9], last: words[2] == "-A"}
	at := len(f.hooks)
	if !h.last { // ahead of those that are appended, in the order in which they are listed
		at = slices.IndexFunc(append(f.hooks, hook{last: true}), func(h hook) bool { return h.last })
	}
	f.hooks = slices.Insert(f.hooks, at, h)
	return nil
}

// rule reads the words of a rule behind its chain.
func (f *Filter) rule(key chainKey, words []string, line string) error {
	if _, ok := f.chains[key]; !ok {
		return fmt.Errorf("chain %s is not declared", key.name)
	}
	p := ruleParser{words: words, rule: rule{text: line}}
	for len(p.words) > 0 {
		err := p.option()
		if err != nil {
			return err
		}
	}
	if p.rule.target == "" {
		return fmt.Errorf("the rule has no target")
	}
	f.chains[key] = append(f.chains[key], p.rule)
	return nil
}

// split divides a line at blanks, keeping what is quoted together.
func split(line string) ([]string, error) {
	if strings.HasPrefix(line, "#") {
		return nil, nil
	}
	var words []string
	for {
		line = strings.TrimLeft(line, " ")
		if line == "" {
			return words, nil
		}
		if line[0] == '"' {
			end := strings.IndexByte(line[1:], '"')
			if end < 0 {
				return nil, fmt.Errorf("a quote does not end")
			}
			words, line = append(words, line[1:end+1]), line[end+2:]
			continue
		}
		word, rest, _ := strings.Cut(line, " ")
		words, line = append(words, word), rest
	}
}

// parsePrefix reads an address or a prefix, whose host bits must be zero.
func parsePrefix(s string) (netip.Prefix, error) {
	if !strings.Contains(s, "/") {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return netip.Prefix{}, err
		}
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(s)
	if err == nil && p != p.Masked() {
		err = fmt.Errorf("%s has host bits", s)
	}
	return p, err
}
