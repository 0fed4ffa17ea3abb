"""Examples of what is sent and answered: the contract's own, with the fields that we add."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

import msgspec

from json_text import decoding


class OperationExample(msgspec.Struct, frozen=True):
    """A request of one operation, and the answer that it gets."""

    path: dict[str, str] = {}
    """Ids in the path that are others than usual."""
    query: dict[str, str] = {}
    bodies: dict[str, Any] = {}
    """By their names."""
    answer: Any = None


def find_example(method: str, path: str) -> OperationExample:
    """Return the example of an operation."""
    return _examples().get(f"{method} {path}", OperationExample())


@cache
def _examples() -> Mapping[str, OperationExample]:
    text = resources.files(__package__).joinpath("examples.json").read_bytes()
    return decoding.decode(text, dict[str, OperationExample])
