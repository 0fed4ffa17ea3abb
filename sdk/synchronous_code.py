"""Synchronous code of the SDK, derived from its asynchronous code by replacing words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

SENTENCES: Final[Mapping[str, str]] = {
    "The tasks of\n    one event loop may share a client.": "Threads may\n    share a client.",
}
WORDS: Final[Mapping[str, str]] = {
    "async def": "def",
    "async for": "for",
    "async with": "with",
    "asyncio": "time",
    "asynchronous": "synchronous",
    "Asynchronous": "Synchronous",
    "AsyncIterator": "Iterator",
    "__aenter__": "__enter__",
    "__aexit__": "__exit__",
    "aclose": "close",
    "aread": "read",
    "aiter_lines": "iter_lines",
}
"""Words that are replaced. Besides, `await` is left out, and names lose the prefix `Async` or `async_`."""
_WORD: Final = re.compile(rf"\b(?:{'|'.join(WORDS)})\b")
_PREFIX: Final = re.compile(r"\bAsync(?=[A-Z])|\basync_(?=[a-z])")


def derive_synchronous(text: str) -> str:
    """Return the text of the synchronous form of an asynchronous module of the SDK, given as text."""
    for found, replaced in SENTENCES.items():
        text = text.replace(found, replaced)
    text = re.sub(r"\bawait ", "", text)
    text = _WORD.sub(lambda match: WORDS[match[0]], text)
    text = _PREFIX.sub("", text)
    # A module may import both `asyncio` and `time`.
    return re.sub(r"^import time\nimport time$", "import time", text, flags=re.MULTILINE)
