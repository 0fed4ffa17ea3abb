"""Size limit of a request body, and its setting."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gateway.http import errors

if TYPE_CHECKING:
    from gateway.http.errors import ApiError


@dataclass(frozen=True, slots=True)
class BodyLimit:
    """Maximum bytes of a body after decompression."""

    bytes: int
    setting: str = "PILOTFLAME_MAX_BODY_BYTES"
    """Setting to name in the refusal; empty when no setting changes the limit."""

    def exceeded(self) -> ApiError:
        """Return the refusal of a larger body."""
        return errors.too_large(self.bytes, self.setting)
