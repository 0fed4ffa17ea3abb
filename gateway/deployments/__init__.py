"""Deployments in the API: deploy, start, stop, trigger, and lifecycle policies."""
