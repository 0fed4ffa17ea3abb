"""Lost workers of a run: how many make it a suspect, and how many end it."""

from __future__ import annotations

from typing import Final

SUSPECT_LOSSES: Final = 2
"""A run that has lost so many workers, with nothing new recorded in between, is a suspect: it is put on trial."""
MAX_ISOLATION_LOSSES: Final = 2
"""A run that has lost so many workers while on trial is given up as crashed."""
MAX_LOST_ATTEMPTS: Final = 10
"""A run that has lost so many workers of any kind is given up as crashed."""
