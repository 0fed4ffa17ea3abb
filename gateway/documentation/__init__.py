"""The documentation that the gateway serves below `/docs/`."""
