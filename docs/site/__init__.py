"""Builds the documentation site that the gateway serves below `/docs/`."""
