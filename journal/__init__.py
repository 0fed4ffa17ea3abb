"""Journal of executions: leases, node spans, results, and the stores that keep them."""
