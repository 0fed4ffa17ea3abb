"""Limit of a body, and the setting behind it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.http import errors

if TYPE_CHECKING:
    from gateway.http.errors import ApiError


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """The most bytes of a body, counted after decompression."""

    bytes: int
    setting: str = "PILOTFLAME_MAX_BODY_BYTES"
    """The setting that a reader of the refusal would change; empty where none sets it."""

    def exceeded(self) -> ApiError:
        """Return the refusal of a larger body."""
        return errors.too_large(self.bytes, self.setting)
