"""Deployments as clients see them: asked for, woken, and told about."""
