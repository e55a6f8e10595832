package ipam

import "time"

// SetClock sets what tells the time since the boot.
func (s *Store) SetClock(now func() (time.Duration, error)) { s.now = now }
