"""Tasks: the protocol of workers, and lists for people."""
