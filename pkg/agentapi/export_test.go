package agentapi

import "context"

// The two halves of Serve, so that a test knows when the socket is there.
var (
	Listen  = listen
	ServeOn = spoken().serve
)

// Look is what a server does from time to time.
func (l *listener) Look() error { return l.look() }

// Spoken stands for a program that speaks some versions of the protocol.
type Spoken struct{ Oldest, Newest int }

// Serve is ServeOn by this program.
func (s Spoken) Serve(ctx context.Context, l *listener, handle Handler) error {
	return versions{s.Oldest, s.Newest}.serve(ctx, l, handle)
}

// Call is Call by this program.
func (s Spoken) Call(ctx context.Context, socket string, req Request) (*Response, error) {
	return versions{s.Oldest, s.Newest}.call(ctx, socket, req)
}
