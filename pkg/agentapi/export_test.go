package agentapi

// The two halves of Serve, so that a test knows when the socket is there.
var (
	Listen  = listen
	ServeOn = serve
)
