"""See a checkpoint and trust it: compare it with another, report on it, verify it on this machine."""
