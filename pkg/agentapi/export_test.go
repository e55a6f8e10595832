package agentapi

// The two halves of Serve, so that a test knows when the socket is there.
var (
	Listen  = listen
	ServeOn = serve
)

// Look is what a server does from time to time.
func (l *listener) Look() error { return l.look() }
