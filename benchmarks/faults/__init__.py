"""Proof of the promises: faults of every part under load, against an external ledger."""
