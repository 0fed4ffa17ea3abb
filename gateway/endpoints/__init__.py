"""Handlers, each beside the shapes that it reads and writes."""
