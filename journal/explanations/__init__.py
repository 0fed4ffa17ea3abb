"""Explanations of runs, nodes, deployments and organizations: why something does not move."""
