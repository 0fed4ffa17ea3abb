"""Metrics of all processes: one table of families, and their exposition to Prometheus."""
