"""Runs as clients see them: taken in, followed, ended, taken up again."""
