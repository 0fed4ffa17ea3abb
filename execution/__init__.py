"""Execution of runs: shared by workers, and by pods that go through the gateway."""
