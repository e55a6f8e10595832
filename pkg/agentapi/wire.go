package agentapi

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// Limits of one message in bytes. A request names one pod; a status names every peer of a large cluster.
const (
	maxRequest  = 64 << 10
	maxResponse = 16 << 20
)

// errTooLong is the answer to a line that exceeds its limit.
var errTooLong = errors.New("message is too long")

// readMessage reads one line of at most limit bytes into v.
func readMessage(r io.Reader, limit int64, v any) error {
	line, err := bufio.NewReader(io.LimitReader(r, limit)).ReadBytes('\n')
	switch {
	case err == nil:
		return json.Unmarshal(line, v)
	case errors.Is(err, io.EOF) && int64(len(line)) == limit:
		return fmt.Errorf("%w: over %d bytes", errTooLong, limit)
	case errors.Is(err, io.EOF) && len(line) > 0:
		return io.ErrUnexpectedEOF
	default:
		return err
	}
}

// writeMessage writes v as one line.
func writeMessage(w io.Writer, v any) error {
	line, err := json.Marshal(v)
	if err != nil {
		return err
	}
	_, err = w.Write(append(line, '\n'))
	return err
}
