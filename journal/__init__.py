"""The record of what runs: who holds which execution, what it has done, and how it ended."""
