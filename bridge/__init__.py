"""The process that takes messages of a queue elsewhere and hands them to a workflow, by way of the API alone."""
