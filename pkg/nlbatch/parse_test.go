package nlbatch

import (
	"encoding/binary"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// message makes a message as the kernel sends it, with its padding.
func message(typ uint16, seq uint32, data ...byte) []byte {
	b := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+len(data)))
	b = binary.NativeEndian.AppendUint16(b, typ)
	b = binary.NativeEndian.AppendUint16(b, 0)
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = append(append(binary.NativeEndian.AppendUint32(b, 0), data...), make([]byte, (4-len(data)%4)%4)...)
	return b
}

// number is how an error number stands in an answer.
func number(errno unix.Errno) []byte { return binary.NativeEndian.AppendUint32(nil, -uint32(errno)) }

// TestParse reads what answers the requests from 7 to 9, and neither loops nor reads beyond what came, whatever that is.
func TestParse(t *testing.T) {
	const listing = unix.NLMSG_MIN_TYPE
	acknowledged := message(unix.NLMSG_ERROR, 9, number(0)...)
	refused := message(unix.NLMSG_ERROR, 8, number(unix.ENOENT)...)
	long := message(unix.NLMSG_ERROR, 9, append(number(unix.EINVAL), make([]byte, 100)...)...)
	sized := func(length uint32) []byte {
		b := slices.Clone(acknowledged)
		binary.NativeEndian.PutUint32(b, length)
		return b
	}
	tests := map[string]struct {
		datagram []byte
		want     []Answer
		done     bool
		broken   bool
	}{
		"nothing":                             {},
		"less than a header":                  {datagram: acknowledged[:15]},
		"an acknowledgement":                  {datagram: acknowledged, want: []Answer{{Seq: 9}}, done: true},
		"a refusal before it":                 {datagram: slices.Concat(refused, acknowledged), want: []Answer{{Seq: 8, Errno: unix.ENOENT}, {Seq: 9}}, done: true},
		"a refusal alone":                     {datagram: refused, want: []Answer{{Seq: 8, Errno: unix.ENOENT}}},
		"a refused request that is cut off":   {datagram: long[:40], want: []Answer{{Seq: 9, Errno: unix.EINVAL}}, done: true},
		"an earlier request's":                {datagram: message(unix.NLMSG_ERROR, 6, number(unix.EPERM)...)},
		"a later one's":                       {datagram: message(unix.NLMSG_ERROR, 10, number(unix.EPERM)...)},
		"a part of a listing":                 {datagram: message(listing, 9, 1, 2, 3), want: []Answer{{Seq: 9, Data: []byte{1, 2, 3}}}},
		"an empty part":                       {datagram: message(listing, 9), want: []Answer{{Seq: 9, Data: []byte{}}}},
		"the end of a listing":                {datagram: message(unix.NLMSG_DONE, 9, number(0)...), want: []Answer{{Seq: 9}}, done: true},
		"its end without a number":            {datagram: message(unix.NLMSG_DONE, 9), want: []Answer{{Seq: 9}}, done: true},
		"a listing that was broken off":       {datagram: message(unix.NLMSG_DONE, 9, number(unix.ENOMEM)...), want: []Answer{{Seq: 9, Errno: unix.ENOMEM}}, done: true},
		"a part of a listing that is cut off": {datagram: message(listing, 9, 1, 2, 3, 4, 5)[:20], broken: true},
		"a length of nothing":                 {datagram: sized(0), broken: true},
		"a length less than a header":         {datagram: sized(15), broken: true},
		"a length of everything":              {datagram: sized(^uint32(0)), want: []Answer{{Seq: 9}}, done: true},
		"a header's length":                   {datagram: sized(16), want: []Answer{{Seq: 9, Data: []byte{}}}},
	}
	for name, c := range tests {
		t.Run(name, func(t *testing.T) {
			var got []Answer
			done, err := parse(c.datagram, 7, 9, func(a Answer) { got = append(got, a) })
			if diff := cmp.Diff(c.want, got); diff != "" {
				t.Errorf("answers (-want +got):\n%s", diff)
			}
			if done != c.done || err != nil != c.broken {
				t.Errorf("done %t, error %v", done, err)
			}
		})
	}
}

// Sequence numbers begin again at 0 some time.
func TestParseWraps(t *testing.T) {
	var got []Answer
	first := ^uint32(0)
	done, err := parse(slices.Concat(message(unix.NLMSG_ERROR, first, number(unix.EEXIST)...), message(unix.NLMSG_ERROR, 0, number(0)...)), first, 0,
		func(a Answer) { got = append(got, a) })
	if diff := cmp.Diff([]Answer{{Seq: first, Errno: unix.EEXIST}, {}}, got); diff != "" || !done || err != nil {
		t.Errorf("done %t, error %v, answers (-want +got):\n%s", done, err, diff)
	}
}
