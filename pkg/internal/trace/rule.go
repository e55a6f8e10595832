package trace

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// ruleParser reads the words of a rule one option at a time.
type ruleParser struct {
	words []string
	rule  rule
	// negated is set by "!" for the option that follows.
	negated bool
	// modules and protocol are what options depend on.
	modules  []string
	protocol string
}

// option reads the next option with its arguments.
func (p *ruleParser) option() error {
	word := p.words[0]
	p.words = p.words[1:]
	arguments, known := map[string]int{
		"!": 0, "-m": 1, "--comment": 1, "-i": 1, "-o": 1, "-s": 1, "-d": 1, "-p": 1, "--dport": 1, "--match-set": 2, "--ctstate": 1,
		"--ctdir": 1, "--ctstatus": 1,
		"--invert": 0, "--syn": 0, "--tcp-flags": 2, "--src-type": 1, "--mark": 1,
		"--limit": 1, "--limit-burst": 1, "-j": 1, "-g": 1,
	}[word]
	if !known {
		return fmt.Errorf("the word %q is unknown", word)
	}
	if len(p.words) < arguments {
		return fmt.Errorf("%s lacks an argument", word)
	}
	args := p.words[:arguments]
	p.words = p.words[arguments:]
	p.rule.options = append(p.rule.options, word)
	if word == "!" {
		p.negated = true
		return nil
	}
	return p.apply(word, args)
}

// apply gives an option its meaning.
func (p *ruleParser) apply(word string, args []string) error {
	switch word {
	case "-m":
		if !slices.Contains([]string{"comment", "set", "conntrack", "rpfilter", "addrtype", "connmark", "mark", "limit"}, args[0]) {
			return fmt.Errorf("the match %q is unknown", args[0])
		}
		p.modules = append(p.modules, args[0])
		return p.noNegation()
	case "--comment":
		if len(args[0]) > 255 {
			return fmt.Errorf("the comment is longer than the kernel takes")
		}
		_, p.rule.comment, _ = strings.Cut(args[0], " ") // behind the hash
		return p.needs("comment", p.noNegation())
	case "-j", "-g":
		return p.target(word, args[0])
	case "-i", "-o":
		return p.interfaces(word, args[0])
	case "-s", "-d":
		return p.address(word, args[0])
	case "--match-set":
		return p.matchSet(args[0], args[1])
	case "-p", "--dport", "--syn", "--tcp-flags":
		return p.transport(word, args)
	default:
		return p.state(word, args)
	}
}

// add appends a match, turned round where "!" stood before it.
func (p *ruleParser) add(m match) {
	if p.negated {
		plain := m
		m = func(f *Filter, packet Packet) bool { return !plain(f, packet) }
	}
	p.negated = false
	p.rule.matches = append(p.rule.matches, m)
}

func (p *ruleParser) noNegation() error {
	if p.negated {
		return fmt.Errorf("a negation stands before what has none")
	}
	return nil
}

// needs returns err, or that a module was not loaded.
func (p *ruleParser) needs(module string, err error) error {
	if err == nil && !slices.Contains(p.modules, module) {
		return fmt.Errorf("-m %s is missing", module)
	}
	return err
}

func (p *ruleParser) interfaces(word, pattern string) error {
	if len(strings.TrimSuffix(pattern, "+")) > 15 {
		return fmt.Errorf("the interface %q is longer than the kernel takes", pattern)
	}
	p.add(func(_ *Filter, packet Packet) bool {
		if word == "-i" {
			return onInterface(pattern, packet.In)
		}
		return onInterface(pattern, packet.Out)
	})
	return nil
}

func (p *ruleParser) address(word, text string) error {
	prefix, err := parsePrefix(text)
	if err != nil {
		return err
	}
	p.add(func(_ *Filter, packet Packet) bool {
		if word == "-s" {
			return prefix.Contains(packet.Src)
		}
		return prefix.Contains(packet.Dst)
	})
	return nil
}

func (p *ruleParser) matchSet(name, sides string) error {
	list := strings.Split(sides, ",")
	if sides != "src" && sides != "dst" && sides != "dst,dst" {
		return fmt.Errorf("the sides %q are unknown", sides)
	}
	p.rule.sets = append(p.rule.sets, name+" "+strconv.Itoa(len(list)))
	p.add(func(f *Filter, packet Packet) bool { return f.sets[name] != nil && f.sets[name].holds(list, packet) })
	return p.needs("set", nil)
}

func (p *ruleParser) transport(word string, args []string) error {
	switch word {
	case "-p":
		if !slices.Contains([]string{"tcp", "udp", "sctp"}, args[0]) {
			return fmt.Errorf("the protocol %q is unknown", args[0])
		}
		p.protocol = args[0]
		p.add(func(_ *Filter, packet Packet) bool { return packet.Protocol == args[0] })
		return nil
	case "--dport":
		first, last, isRange := strings.Cut(args[0], ":")
		if !isRange {
			last = first
		}
		low, lowErr := strconv.ParseUint(first, 10, 16)
		high, highErr := strconv.ParseUint(last, 10, 16)
		if lowErr != nil || highErr != nil || low > high || p.protocol == "" {
			return fmt.Errorf("%q is no port of %q", args[0], p.protocol)
		}
		p.add(func(_ *Filter, packet Packet) bool {
			return low <= uint64(packet.DstPort) && uint64(packet.DstPort) <= high
		})
		return nil
	}
	flags := []string{"S"}
	if word == "--tcp-flags" {
		if args[0] != "SYN,RST" || args[1] != "SYN" {
			return fmt.Errorf("the flags %q are unknown", args)
		}
		flags = []string{"S", "SA"}
	}
	if p.protocol != "tcp" {
		return fmt.Errorf("%s is for tcp", word)
	}
	p.add(func(_ *Filter, packet Packet) bool { return slices.Contains(flags, packet.Flags) })
	return nil
}

func (p *ruleParser) state(word string, args []string) error {
	switch word {
	case "--invert": // of rpfilter
		p.add(func(_ *Filter, packet Packet) bool { return packet.Spoofed })
		return p.needs("rpfilter", nil)
	case "--src-type":
		if args[0] != "LOCAL" {
			return fmt.Errorf("the address type %q is unknown", args[0])
		}
		p.add(func(_ *Filter, packet Packet) bool { return packet.FromNode })
		return p.needs("addrtype", nil)
	case "--mark":
		return p.mark(args[0])
	case "--limit", "--limit-burst": // no packet here is one too many
		return p.needs("limit", p.noNegation())
	}
	return p.connection(word, args)
}

// connection makes a match on what conntrack knows of the packet.
func (p *ruleParser) connection(word string, args []string) error {
	switch word + " " + args[0] {
	case "--ctdir ORIGINAL":
		p.add(func(_ *Filter, packet Packet) bool { return !packet.Reply })
		return p.needs("conntrack", nil)
	case "--ctstatus CONFIRMED": // NEW is the first packet here
		p.add(func(_ *Filter, packet Packet) bool { return packet.State == "ESTABLISHED" || packet.State == "RELATED" })
		return p.needs("conntrack", nil)
	}
	if word != "--ctstate" {
		return fmt.Errorf("%s %s is unknown", word, args[0])
	}
	states := strings.Split(args[0], ",")
	for _, s := range states {
		if !slices.Contains([]string{"NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED", "DNAT", "SNAT"}, s) {
			return fmt.Errorf("the state %q is unknown", s)
		}
	}
	p.add(func(_ *Filter, packet Packet) bool {
		return slices.Contains(states, packet.State) || packet.DNAT && slices.Contains(states, "DNAT") ||
			packet.SNAT && slices.Contains(states, "SNAT")
	})
	return p.needs("conntrack", nil)
}

// mark makes a match on the packet's mark or its connection's, whichever of the two modules the rule loads.
func (p *ruleParser) mark(text string) error {
	mark, mask, err := parseMark(text)
	if err != nil {
		return err
	}
	own, connection := slices.Contains(p.modules, "mark"), slices.Contains(p.modules, "connmark")
	if own == connection {
		return fmt.Errorf("--mark %s needs either -m mark or -m connmark", text)
	}
	p.add(func(_ *Filter, packet Packet) bool {
		if own {
			return packet.Mark&mask == mark
		}
		return packet.ConnMark&mask == mark
	})
	return nil
}

// parseMark reads a mark and the mask of the bits that it is about.
func parseMark(text string) (mark, mask uint32, err error) {
	markText, maskText, _ := strings.Cut(text, "/")
	mark64, markErr := strconv.ParseUint(markText, 0, 32)
	mask64, maskErr := strconv.ParseUint(maskText, 0, 32)
	if markErr != nil || maskErr != nil || mark64&^mask64 != 0 {
		return 0, 0, fmt.Errorf("%q is no mark with a mask", text)
	}
	return uint32(mark64), uint32(mask64), nil
}

// target reads a target with its arguments, which end the rule.
func (p *ruleParser) target(word, name string) error {
	p.rule.target = name
	rest := p.words
	p.words = nil
	limited := slices.Contains(p.modules, "limit")
	switch {
	case limited != (name == "NFLOG"):
		return fmt.Errorf("%s and a limit do not go together as they should", name)
	case limited:
		return p.log(rest)
	case word == "-g":
		p.rule.jump, p.rule.gotos = true, true
	case name == "SNAT" && len(rest) == 2 && rest[0] == "--to-source":
		p.rule.target, rest = "SNAT "+rest[1], nil
	case name == "MASQUERADE" && slices.Equal(rest, []string{"--random-fully"}),
		name == "TCPMSS" && slices.Equal(rest, []string{"--clamp-mss-to-pmtu"}):
		rest = nil
	case name == "MARK" && len(rest) == 2 && rest[0] == "--set-xmark":
		mark, mask, err := parseMark(rest[1])
		if err != nil {
			return err
		}
		p.rule.marks, rest = func(old uint32) uint32 { return old&^mask ^ mark }, nil
	case name == "DROP", name == "ACCEPT", name == "RETURN":
	case strings.ToUpper(name) == name && strings.Contains(name, "-"):
		p.rule.jump = true
	default:
		return fmt.Errorf("the target %q is unknown", name)
	}
	if len(rest) > 0 {
		return fmt.Errorf("the target's arguments %q are unknown", rest)
	}
	return p.noNegation()
}

// log reads the arguments of NFLOG, which lets packets go on.
func (p *ruleParser) log(args []string) error {
	if len(args) != 6 || !slices.Equal([]string{args[0], args[2], args[4]}, []string{"--nflog-group", "--nflog-size", "--nflog-prefix"}) {
		return fmt.Errorf("the arguments %q do not log", args)
	}
	if len(args[5]) > 63 {
		return fmt.Errorf("the prefix %s is longer than the kernel takes", args[5])
	}
	p.rule.logs = args[5]
	return p.noNegation()
}
