"""Data sources: connections of workflows to external servers, with write-only secrets."""
