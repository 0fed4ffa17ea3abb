"""Entry point of `python -m pilotflame`, for environments without the command on PATH."""

from pilotflame.command import main

main()
