"""Ingest of inbound requests: authentication of senders, runs, and stored deliveries."""
