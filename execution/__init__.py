"""What it takes to run executions, whoever runs them: a worker, or a pod by way of the gateway."""
