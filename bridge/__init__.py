"""Bridge that moves messages from an external queue to a workflow's queue trigger, through the public API."""
