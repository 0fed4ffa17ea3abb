"""Journal store for PostgreSQL."""
