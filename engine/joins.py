"""How branches meet in a node: which of them it waits for, and what it is given of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from engine.errors import NodeError
from engine.expressions import ExpressionError
from engine.values import kind

if TYPE_CHECKING:
    from engine.values import Json


class Mode(StrEnum):
    """Which branches a node waits for."""

    ALL = "all"
    """All that aren't skipped."""
    ANY = "any"
    """The one that arrives first; those that arrive later change nothing."""


class Combine(StrEnum):
    """How the outputs of several branches are laid together."""

    BY_NODE = "by-node"
    MERGED = "merged"
    LIST = "list"


@dataclass(frozen=True, slots=True)
class Join:
    """What the config of a node that joins branches says."""

    mode: Mode = Mode.ALL
    combine: Combine = Combine.BY_NODE

    @classmethod
    def of(cls, config: Mapping[str, Json]) -> Self:
        """Read the fields `mode` and `combine`; raises `ExpressionError` for a value that means nothing."""
        mode, combine = config.get("mode", Mode.ALL), config.get("combine", Combine.BY_NODE)
        try:
            return cls(Mode(str(mode)), Combine(str(combine)))
        except ValueError as error:
            raise ExpressionError("merge", str(error)) from error

    def data(self, outputs: Mapping[str, Json]) -> Json:
        """Return what a node that waited for all is given of their outputs, by node id, in the order of their edges."""
        match self.combine:
            case Combine.BY_NODE:
                return dict(outputs)
            case Combine.LIST:
                return list(outputs.values())
            case Combine.MERGED:
                return _merged(outputs)


def _merged(outputs: Mapping[str, Json]) -> Json:
    merged: dict[str, Json] = {}
    for node_id, output in outputs.items():
        if not isinstance(output, dict):
            message = (
                f"Only objects can be merged, and node {node_id} gave {kind(output)}: combine by-node or list"
            )
            raise NodeError(message, code="not-mergeable")
        merged.update(output)
    return merged
