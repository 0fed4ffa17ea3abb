"""Suggestions for misspelled names."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from itertools import takewhile
from typing import Final

MAX_COMPARED: Final = 100
"""Number of characters that are compared; a longer name is no typing error."""
CUTOFF: Final = 0.7
"""Minimum similarity of two names, from 0 to 1; less would be a guess."""


MIN_PREFIX: Final = 3
"""Minimum length of a prefix that is completed; shorter ones match too many names by chance."""
MIN_STEM: Final = 4
MAX_ENDING: Final = 3
"""Maximum length of differing endings: `retries` and `retry` share a stem of at least `MIN_STEM` characters.
"""


def suggest_names(given: str, known: Collection[str]) -> list[str]:
    """Return at most two known names that an unknown name may mean, the likeliest first; a single one is
    certain enough for a fix.

    Only the first rule that finds any counts: the same letters without `_`, `-` and case, names with that
    prefix, names with the same stem, similar names. Empty if none is near.
    """
    start = given[:MAX_COMPARED]
    letters = _normalize_name(start)
    by_letters = {name: _normalize_name(name) for name in known}
    return (
        [name for name in known if by_letters[name] == letters]
        or sorted((name for name in known if _shares_prefix(by_letters[name], letters)), key=len)
        or [name for name in known if _shares_stem(by_letters[name], letters)]
        or get_close_matches(start, known, n=2, cutoff=CUTOFF)
    )[:2]


def _normalize_name(name: str) -> str:
    """Return a name in lower case without `_` and `-`: `max_attempts` equals `maxAttempts`."""
    return name.casefold().replace("_", "").replace("-", "")


def _shares_prefix(known: str, given: str) -> bool:
    """Return whether the given name, of three letters at least, begins the known one."""
    return len(given) >= MIN_PREFIX and known.startswith(given)


def _shares_stem(known: str, given: str) -> bool:
    """Return whether two normalized names share at least their first four letters, and have at most three more each."""
    stem = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, given, strict=False)))
    return stem >= MIN_STEM and max(len(known), len(given)) - stem <= MAX_ENDING
