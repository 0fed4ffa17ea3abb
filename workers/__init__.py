"""The workers: they claim what is pending, run it, and record what came of it."""
