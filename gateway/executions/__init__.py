"""Executions in the API: accept, list, follow, cancel and resume runs."""
