"""Desired state, activity and decisions of deployments."""
