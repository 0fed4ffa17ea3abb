"""The run path on PostgreSQL."""
