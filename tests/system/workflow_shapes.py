"""The workflows that the tests run."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.values import Json
    from tests.system.ledger import EffectLedger

Node = dict[str, "Json"]

START: Node = {"id": "start", "nodeId": "rest-api"}


def set_node(node_id: str) -> Node:
    """Return a node that only computes, without effects."""
    return {"id": node_id, "nodeId": "set", "config": {"values": {"passed": node_id}}}


def wait_node(node_id: str, seconds: float) -> Node:
    """Return a node that waits and releases its worker meanwhile."""
    return {"id": node_id, "nodeId": "wait", "config": {"seconds": seconds}}


def build_workflow(nodes: list[Node], edges: str, **settings: Json) -> dict[str, Json]:
    """Return the definition of an active workflow; its edges are written as `start>one one>two if:true>three`."""
    return {
        "name": "System test",
        "status": "active",
        "nodes": [*nodes],
        "connections": [_parse_connection(edge) for edge in edges.split()],
        "settings": settings,
    }


def chain_workflow(*nodes: Node, **settings: Json) -> dict[str, Json]:
    """Return the definition of an active workflow with a trigger and these nodes in a row."""
    ids = [node["id"] for node in (START, *nodes)]
    edges = " ".join(f"{source}>{target}" for source, target in pairwise(ids))
    return build_workflow([START, *nodes], edges, **settings)


def journey_workflow(ledger: EffectLedger) -> dict[str, Json]:
    """Return a workflow of 20 pure, read and write nodes, with two parallel branches and one that is not taken."""
    check: Node = {
        "id": "check",
        "nodeId": "conditional",
        "config": {"condition": {"left": "{{ data.passed }}", "operator": "equals", "right": "merge"}},
    }
    note: Node = {"id": "note", "nodeId": "log", "config": {"message": "Reserved {{ data.body.receipt }}"}}
    report: Node = {
        "id": "report",
        "nodeId": "template",
        "config": {"text": "{{ nodes.price.body.receipt }}"},
    }
    nodes = [
        *(START, set_node("prepare"), ledger.reads("stock"), ledger.writes("reserve"), note),
        *(ledger.reads("price"), ledger.writes("charge"), set_node("shape")),
        *(ledger.reads("address"), ledger.writes("label"), set_node("merge"), check),
        *(ledger.writes("ship"), ledger.writes("never"), report, ledger.reads("carrier")),
        *(ledger.writes("notify"), ledger.writes("archive"), ledger.reads("rating"), set_node("done")),
    ]
    edges = """
        start>prepare prepare>stock stock>reserve reserve>note
        note>price price>charge charge>shape shape>merge
        note>address address>label label>merge
        merge>check check:true>ship check:false>never
        ship>report report>carrier carrier>notify notify>archive archive>rating rating>done
    """
    return build_workflow(nodes, edges)


def _parse_connection(edge: str) -> dict[str, Json]:
    source, target = edge.split(">")
    node_id, _, port = source.partition(":")
    return {"source": node_id, "sourcePort": port or "output", "target": target}
