"""How branches meet in a node: which of them it waits for, and what it is given of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from engine.expressions import ExpressionError
from engine.run_errors import NodeError
from engine.values import type_name

if TYPE_CHECKING:
    from engine.values import Json


class JoinMode(StrEnum):
    """Which branches a node waits for."""

    ALL = "all"
    """All that aren't skipped."""
    ANY = "any"
    """The one that arrives first; those that arrive later change nothing."""


class JoinCombination(StrEnum):
    """How the outputs of several branches are laid together."""

    BY_NODE = "by-node"
    MERGED = "merged"
    LIST = "list"


@dataclass(frozen=True, slots=True)
class JoinConfig:
    """What the config of a node that joins branches says."""

    mode: JoinMode = JoinMode.ALL
    combine: JoinCombination = JoinCombination.BY_NODE

    @classmethod
    def from_config(cls, config: Mapping[str, Json]) -> Self:
        """Read the fields `mode` and `combine`; raises `ExpressionError` for a value that means nothing."""
        mode, combine = config.get("mode", JoinMode.ALL), config.get("combine", JoinCombination.BY_NODE)
        try:
            return cls(JoinMode(str(mode)), JoinCombination(str(combine)))
        except ValueError as error:
            raise ExpressionError("merge", str(error)) from error

    def data(self, outputs: Mapping[str, Json]) -> Json:
        """Return what a node that waited for all is given of their outputs, by node id, in the order of their edges."""
        match self.combine:
            case JoinCombination.BY_NODE:
                return dict(outputs)
            case JoinCombination.LIST:
                return list(outputs.values())
            case JoinCombination.MERGED:
                return _merge_objects(outputs)


def _merge_objects(outputs: Mapping[str, Json]) -> Json:
    merged: dict[str, Json] = {}
    for node_id, output in outputs.items():
        if not isinstance(output, dict):
            given = f"node {node_id} gave {type_name(output)}"
            message = f"Only objects can be merged, and {given}: combine by-node or list"
            raise NodeError(message, code="not-mergeable")
        merged.update(output)
    return merged
