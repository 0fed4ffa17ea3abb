"""`python -m pilotflame`: the command, where it isn't on PATH."""

from pilotflame.cli import app

app()
