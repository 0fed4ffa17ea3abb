"""Workflows in the API: read, edit, copy, version and share them."""
