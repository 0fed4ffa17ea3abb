"""Journal store for SQLite."""
