"""Scheduler: periodic duties of one leading process. Every duty is idempotent."""
