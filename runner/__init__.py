"""The process in a workflow's pod: runs its executions, and speaks to nobody but the gateway about them."""
