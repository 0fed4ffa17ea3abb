"""Names that somebody got nearly right."""

from __future__ import annotations

from collections.abc import Collection
from difflib import get_close_matches
from itertools import takewhile
from typing import Final

MAX_COMPARED: Final = 100
"""Characters of a name that are compared: what is longer was not mistyped."""
CUTOFF: Final = 0.7
"""How alike two names are at least, from 0 to 1; less is a guess."""


MIN_PREFIX: Final = 3
"""Characters of a name that begin one known name, or a few: fewer begin too many by chance."""
MIN_STEM: Final = 4
MAX_ENDING: Final = 3
"""`retries` and `retry` share a stem of four characters or more, and have endings of three at most."""


def suggest_names(given: str, known: Collection[str]) -> list[str]:
    """Return the known names that may be meant by one that isn't known, two at most; one alone is certain enough.

    The same letters come first, then names that begin with it, then names with its stem, then those that are alike.
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
    """Return a name without what conventions of writing change: `max_attempts` is `maxAttempts`."""
    return name.casefold().replace("_", "").replace("-", "")


def _shares_prefix(known: str, given: str) -> bool:
    return len(given) >= MIN_PREFIX and known.startswith(given)


def _shares_stem(known: str, given: str) -> bool:
    stem = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(known, given, strict=False)))
    return stem >= MIN_STEM and max(len(known), len(given)) - stem <= MAX_ENDING
