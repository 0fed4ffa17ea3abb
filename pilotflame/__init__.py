"""Command line, and the process that runs every role."""
