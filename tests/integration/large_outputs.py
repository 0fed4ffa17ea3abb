"""Nodes with outputs that are too large for a row."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from engine.node_api import EffectRule, NodeCall, NodeEffect, NodeType, RunNode
from engine.values import Json
from nodes import catalog
from nodes.catalog import NodeCatalog


@dataclass(frozen=True)
class LargeOutputCatalog(NodeCatalog):
    """Node catalog of the library, with node types made up for a test."""

    runs: dict[str, RunNode] = field(default_factory=dict)

    def implementation(self, type: str) -> RunNode:  # noqa: A002 - the field's own word
        return self.runs[type] if type in self.runs else super().implementation(type)


def emit_different_text(_call: NodeCall) -> Json:
    """Return a text of a million characters that differs in every attempt."""
    return {"text": os.urandom(500_000).hex()}


def emit_length(call: NodeCall) -> Json:
    """Return the length of the text in the input; None without one."""
    data = call.data
    text = data.get("text") if isinstance(data, dict) else None
    return {"length": len(text) if isinstance(text, str) else None}


def make_node_type(name: str, effect: NodeEffect = NodeEffect.PURE) -> NodeType:
    return NodeType(name, name, "1.0.0", "test", "", EffectRule(effect), {"type": "object"})


def build_catalog(**runs: RunNode) -> NodeCatalog:
    """Return the catalog of the library with the nodes `unlike` and `length`, and those of `runs`;
    all but `effect` are pure.
    """
    runs = {"unlike": emit_different_text, "length": emit_length, **runs}
    types = {
        name: make_node_type(name, NodeEffect.WRITE if name == "effect" else NodeEffect.PURE) for name in runs
    }
    return LargeOutputCatalog({**catalog.load_catalog().node_types, **types}, runs)
