"""Protocols by which the engine looks up node types; a catalog implements them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from engine.node_api import NodeType
    from engine.values import Json


class ConfigProblemView(Protocol):
    """Problem in a config: its place, a message, and the schema keyword that it violates."""

    @property
    def path(self) -> str: ...
    @property
    def steps(self) -> tuple[str | int, ...]: ...
    @property
    def meant(self) -> Json:
        """Name of a field, or value, that is certain to be intended; None if there is none."""

    @property
    def message(self) -> str: ...
    @property
    def keyword(self) -> str: ...


class NodeTypeLookup(Protocol):
    """Lookup of node types; raises `UnknownNodeType` for an unknown type or version."""

    @property
    def default_model_id(self) -> str | None:
        """Id of the language model that `default` in a config means; None without one."""

    def get(self, type: str, version: str | None = None) -> NodeType:  # noqa: A002 - the field's own word
        """Return a node type in a version, the newest if it is None; raises `UnknownNodeType`."""

    def with_defaults(self, node_type: NodeType, config: Mapping[str, Json]) -> dict[str, Json]:
        """Return a copy of a config with the defaults of the type's schema for missing fields, also nested ones."""

    def implementation_digest(self, node_type: NodeType) -> bytes:
        """Return a digest of the code of a node type, as a part of the key of its nodes, so that changed code
        is run again.
        """

    def config_problems(self, node_type: NodeType, config: Mapping[str, Json]) -> Sequence[ConfigProblemView]:
        """Return the problems of a stored config by the type's schema, in which templates fit any field."""

    def rendered_config_problems(
        self, node_type: NodeType, config: Mapping[str, Json]
    ) -> Sequence[ConfigProblemView]:
        """Return the problems of a custom type's config after its expressions are replaced; types of the
        library have none here.
        """
