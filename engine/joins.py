"""Joins of branches in a node: the branches to wait for, and the combination of their outputs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from engine.expressions import ExpressionError
from engine.run_errors import NodeError
from engine.values import type_name

if TYPE_CHECKING:
    from engine.values import Json


class JoinMode(StrEnum):
    """Branches that a join waits for."""

    ALL = "all"
    """All branches that aren't skipped."""
    ANY = "any"
    """The first branch to arrive; later ones are ignored."""


class JoinCombination(StrEnum):
    """Combination of the outputs of several branches."""

    BY_NODE = "by-node"
    MERGED = "merged"
    LIST = "list"


class JoinConfig(Struct, frozen=True):
    """Config of a node that joins branches."""

    mode: JoinMode = JoinMode.ALL
    combine: JoinCombination = JoinCombination.BY_NODE

    @classmethod
    def from_config(cls, config: Mapping[str, Json]) -> Self:
        """Read the fields `mode` (`all` if missing) and `combine` (`by-node`); raises `ExpressionError` for an unknown
        value.
        """
        mode, combine = config.get("mode", JoinMode.ALL), config.get("combine", JoinCombination.BY_NODE)
        try:
            return cls(JoinMode(str(mode)), JoinCombination(str(combine)))
        except ValueError as error:
            raise ExpressionError("merge", str(error)) from error

    def combine_outputs(self, outputs: Mapping[str, Json]) -> Json:
        """Return the input of a join, made of the outputs of its parents: an object by node id, a list, or one merged
        object, in which later fields win.

        `outputs` are by node id, in the order of edges. Raises `NodeError` if a value to merge is no object.
        """
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
