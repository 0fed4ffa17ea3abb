"""Workflows as they are written: read, changed, copied, versioned and shared."""
