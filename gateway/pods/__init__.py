"""API through which pods reach the journal and node services without a database connection: see `execution.pod_api`."""
