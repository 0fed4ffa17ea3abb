"""How the engine asks for node types: the protocols that a catalog implements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.node_api import NodeType
    from engine.values import Json


class ConfigProblemView(Protocol):
    """One thing wrong with a config: where, what, and the schema keyword that says so."""

    @property
    def path(self) -> str: ...
    @property
    def steps(self) -> tuple[str | int, ...]: ...
    @property
    def meant(self) -> Json:
        """The name of a field, or the value, that is certain to be meant; None: none is."""

    @property
    def message(self) -> str: ...
    @property
    def keyword(self) -> str: ...


class NodeTypeLookup(Protocol):
    """Where node types are looked up; raises `UnknownNodeType` for one that isn't there."""

    def get(self, type: str, version: str | None = None) -> NodeType: ...  # noqa: A002 - the field's own word
    def with_defaults(self, node_type: NodeType, config: Mapping[str, Json]) -> dict[str, Json]: ...
    def config_problems(
        self, node_type: NodeType, config: Mapping[str, Json]
    ) -> Sequence[ConfigProblemView]: ...
