"""The run path on SQLite."""
