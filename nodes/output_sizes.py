"""Running size of the output of a list node: an output that exceeds the limit fails the node early."""

from __future__ import annotations

from typing import TYPE_CHECKING

from engine.run_errors import NodeError
from engine.values import InvalidJson, encode_json

if TYPE_CHECKING:
    from engine.values import Json

MAXIMUM_BYTES = 10_000_000
"""Maximum size as JSON; larger outputs are never stored."""
SCALAR_BYTES = 4


class OutputSize:
    """Total size of values in bytes, with repeated values counted each time."""

    def __init__(self, name: str) -> None:
        self._name = name
        """Name of the values in the error, such as `The items`."""
        self._count = 0
        self._bytes = 0

    def add(self, value: Json) -> None:
        """Add the size of a value, as JSON for containers; raises `NodeError` if the total exceeds ten
        million bytes.
        """
        self._count += 1
        self._bytes += self._of(value)
        if self._bytes > MAXIMUM_BYTES:
            raise self._exceeded()

    def _of(self, value: Json) -> int:
        if isinstance(value, str):
            return len(value)
        if not isinstance(value, dict | list):
            return SCALAR_BYTES
        try:
            return len(encode_json(value, max_bytes=MAXIMUM_BYTES))
        except InvalidJson as error:
            if error.code != "too-large":
                raise
            raise self._exceeded() from error

    def _exceeded(self) -> NodeError:
        message = f"{self._name} take more than {MAXIMUM_BYTES:,} bytes: exceeded at number {self._count:,}"
        return NodeError(message, code="output-too-large")
