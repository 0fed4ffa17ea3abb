"""Limits of lost workers of a run: for becoming a suspect, and for failing as crashed."""

from __future__ import annotations

from typing import Final

SUSPECT_LOSSES: Final = 2
"""Workers that a run may lose, with nothing new recorded in between, before it is a suspect and gets a trial
in isolation.
"""
MAX_ISOLATION_LOSSES: Final = 2
"""Workers that a run may lose in trials before it fails as crashed."""
MAX_LOST_ATTEMPTS: Final = 10
"""Workers of any kind that a run may lose before it fails as crashed."""
