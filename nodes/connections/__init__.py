"""Connections to what users name as data sources: databases, buckets, and what goes into the headers of a request."""
