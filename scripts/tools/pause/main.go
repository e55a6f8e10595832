// Command pause is the process of a pod's sandbox: it holds the pod's namespaces, reaps what is left to it, and does
// nothing else until it is told to end.
package main

import (
	"os"
	"os/signal"
	"syscall"
)

func main() {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGINT, syscall.SIGTERM)
	signal.Ignore(syscall.SIGCHLD) // the kernel then reaps the children of process 1 by itself
	<-end
}
