"""Workflow model and engine: plain Python without a database, queue or web server."""
