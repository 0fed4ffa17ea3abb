"""Clusters: platforms for the pods of deployed workflows, with one protocol and one driver per kind."""
