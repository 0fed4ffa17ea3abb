"""Deployer: the process that reconciles deployments with a cluster. No other process has permissions there."""
