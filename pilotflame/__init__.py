"""The command, and every role in one process."""
