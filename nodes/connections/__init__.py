"""Connections to users' data sources: databases, buckets, mail servers, and credentials for HTTP requests."""
