"""The process that brings a cluster to what is wanted of deployments; nobody else has rights there."""
