"""Explanations: why a run, a workflow or the runs of an organization do not move."""
