"""What pods ask of the gateway in the place of a database: see `execution.pod_api`."""
