// Package single has a process run on one processor from its start, by being imported.
//
// The plugin hardly ever has two things to do at a time but waiting; to hand them from thread to thread costs more than it gains, most of all
// on a busy node. The package imports nothing but runtime, and its path comes early in the alphabet, so that Go initializes it among the first:
// later the runtime would have to give back the memory of the other processors' caches, at a page fault for each size of object that was
// made by then.
package single

import "runtime"

var _ = runtime.GOMAXPROCS(1)
