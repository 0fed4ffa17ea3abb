"""Examples of requests and responses: those of the contract, with the fields that Pilotflame adds."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Final

import msgspec

from json_text import decoding


class OperationExample(msgspec.Struct, frozen=True):
    """Example request of one operation, and its response."""

    path: dict[str, str] = {}
    """Path ids that differ from the usual ones."""
    query: dict[str, str] = {}
    bodies: dict[str, Any] = {}
    """Request bodies by name."""
    answer: Any = None
    stream: Any = None
    """Event of the stream that clients may request instead of the answer."""


NO_EXAMPLE: Final = OperationExample()


def find_example(method: str, path: str) -> OperationExample:
    """Return the example of an operation; an empty example if it has none."""
    return _load_examples().get(f"{method} {path}", NO_EXAMPLE)


@cache
def _load_examples() -> Mapping[str, OperationExample]:
    text = resources.files(__package__).joinpath("examples.json").read_bytes()
    return decoding.decode(text, dict[str, OperationExample])
