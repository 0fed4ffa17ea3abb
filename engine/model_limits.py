"""Limits of the calls of a language model, and their shares for processes that call it."""

from __future__ import annotations

from typing import Annotated, TypeAlias

import msgspec

CallRate: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=10_000_000)]
TokenRate: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)]


class ModelLimits(
    msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, forbid_unknown_fields=True
):
    """Limits that an organization sets for a model; None: no limit."""

    requests_per_minute: CallRate | None = None
    tokens_per_minute: TokenRate | None = None
    """Input and output together."""
    concurrency: CallRate | None = None
    """Calls at the same time."""


class ModelLimitShare(msgspec.Struct, frozen=True):
    """Limits of a model for one of the processes that call it; None: no limit."""

    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    concurrency: int | None = None


def share_limits(limits: ModelLimits, processes: int) -> ModelLimitShare:
    """Return the limits of one of several processes: equal shares, `concurrency` rounded down to 1 at least; None stays
    None.
    """
    requests, tokens = limits.requests_per_minute, limits.tokens_per_minute
    return ModelLimitShare(
        None if requests is None else requests / processes,
        None if tokens is None else tokens / processes,
        None if limits.concurrency is None else max(limits.concurrency // processes, 1),
    )
