"""Allowances that the clients of a gateway share, such as its open event streams.

Nothing is reserved: a client alone may take all places. Once none is free, the largest client gives one to each
client with fewer, so that it never takes the first place of another.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from gateway.http import errors

if TYPE_CHECKING:
    from types import TracebackType


class SharedPlace:
    """Place that one request occupies until it is released, or until a smaller client gets it."""

    __slots__ = ("_allowance", "evict", "key_id", "organization_id")

    def __init__(
        self, allowance: SharedAllowance, organization_id: str, key_id: str, evict: Callable[[], None]
    ) -> None:
        self._allowance = allowance
        self.organization_id = organization_id
        self.key_id = key_id
        self.evict = evict

    def release(self) -> None:
        """Free the place, unless it is free already."""
        self._allowance.remove(self)

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class SharedAllowance:
    """Limited number of places, shared equally by organizations, and within each by its keys."""

    def __init__(self, limit: int, refusal: str) -> None:
        """Set the number of places, and the message of the 503 error for a client that gets none."""
        self.limit = limit
        self.taken = 0
        self._refusal = refusal
        self._places: dict[str, dict[str, dict[SharedPlace, None]]] = {}
        """Places by organization and key, the oldest first."""

    def require(self, organization_id: str, key_id: str) -> None:
        """Raise a 503 error unless `take` gives this client a place now."""
        if self.taken >= self.limit:
            self._find_surplus(organization_id, key_id)

    def take(self, organization_id: str, key_id: str, evict: Callable[[], None]) -> SharedPlace:
        """Take a place, the oldest one of the largest client if none is free; `evict` ends the request that loses its
        place so.

        Raises a 503 error if this client would have the most then.
        """
        if self.taken >= self.limit:
            surplus = self._find_surplus(organization_id, key_id)
            self.remove(surplus)
            surplus.evict()
        place = SharedPlace(self, organization_id, key_id, evict)
        self._places.setdefault(organization_id, {}).setdefault(key_id, {})[place] = None
        self.taken += 1
        return place

    def remove(self, place: SharedPlace) -> None:
        """Free a place, unless it is free already."""
        keys = self._places.get(place.organization_id, {})
        places = keys.get(place.key_id, {})
        if place not in places:
            return
        del places[place]
        self.taken -= 1
        if not places:
            del keys[place.key_id]
        if not keys:
            del self._places[place.organization_id]

    def _find_surplus(self, organization_id: str, key_id: str) -> SharedPlace:
        """Return the place that a client may get: of the largest organization if that has more than the client's would
        have, otherwise of a larger key of its own. Raises a 503 error for a client that has its share.
        """
        sizes = {name: sum(map(len, keys.values())) for name, keys in self._places.items()}
        largest = max(sizes, key=sizes.__getitem__, default=organization_id)
        is_other = sizes.get(largest, 0) > sizes.get(organization_id, 0) + 1
        keys = self._places.get(largest if is_other else organization_id, {})
        places = max(keys.values(), key=len, default={})
        if not is_other and len(places) <= len(keys.get(key_id, {})) + 1:
            raise errors.not_ready(self._refusal)
        return next(iter(places))
