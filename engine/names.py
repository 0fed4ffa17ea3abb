"""Names that somebody got nearly right."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from typing import Final

MAX_COMPARED: Final = 100
"""Characters of a name that are compared: what is longer was not mistyped."""
CUTOFF: Final = 0.7
"""How alike two names are at least, from 0 to 1; less is a guess."""


def meant(given: str, known: Collection[str]) -> list[str]:
    """Return the known names that may be meant by one that isn't known, two at most; one alone is certain enough."""
    start = given[:MAX_COMPARED]
    folded = start.casefold()
    return [name for name in known if name.casefold() == folded][:2] or get_close_matches(
        start, known, n=2, cutoff=CUTOFF
    )
