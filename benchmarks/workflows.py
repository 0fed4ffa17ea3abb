"""The workflows that are run, and what must come out of them for a number `x` that goes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LIGHT_NODES = 40


@dataclass(frozen=True, slots=True)
class Workflow:
    """A graph and the result that it owes."""

    name: str
    nodes: Sequence[Mapping[str, Any]]
    connections: Sequence[Mapping[str, str]]
    is_right: Callable[[int, Mapping[str, Any]], bool]
    """Whether these are the outputs, by node id, of a run that was given `x`."""


def pure() -> Workflow:
    """Add one, ask whether that is even, say so: three nodes run, the branch not taken is skipped."""

    def is_right(x: int, outputs: Mapping[str, Any]) -> bool:
        taken, skipped = ("odd", "even") if x % 2 == 0 else ("even", "odd")
        said = outputs.get(taken)
        return skipped not in outputs and said is not None and (said["sum"], said["parity"]) == (x + 1, taken)

    nodes = [
        START,
        _set("add", "sum", _plus_one("{{ data.body.x }}")),
        {
            "id": "check",
            "type": "conditional",
            "config": {"condition": {"left": "{{ data.sum }}", "operator": "divisible-by", "right": 2}},
        },
        _set("even", "parity", "even"),
        _set("odd", "parity", "odd"),
    ]
    connections = [
        {"source": "start", "target": "add"},
        {"source": "add", "target": "check"},
        {"source": "check", "sourcePort": "true", "target": "even"},
        {"source": "check", "sourcePort": "false", "target": "odd"},
    ]
    return Workflow("three pure nodes", nodes, connections, is_right)


def light_chain() -> Workflow:
    """Add one, forty times over, one node after another."""

    def is_right(x: int, outputs: Mapping[str, Any]) -> bool:
        return bool(outputs[f"add-{LIGHT_NODES}"]["sum"] == x + LIGHT_NODES)

    first = _set("add-1", "sum", _plus_one("{{ data.body.x }}"))
    others = [
        _set(f"add-{number}", "sum", _plus_one("{{ data.sum }}")) for number in range(2, LIGHT_NODES + 1)
    ]
    return _chain("forty light nodes", [START, first, *others], is_right)


def three_writes(url: str) -> Workflow:
    """Call another system three times, each time with its last answer."""

    def is_right(x: int, outputs: Mapping[str, Any]) -> bool:
        return bool(outputs["third"]["body"] == {"number": x + 3})

    nodes = [
        START,
        _post("first", url, "{{ data.body.x }}"),
        _post("second", url, "{{ data.body.number }}"),
        _post("third", url, "{{ data.body.number }}"),
    ]
    return _chain("three writes", nodes, is_right)


START: Mapping[str, Any] = {"id": "start", "type": "manual"}


def _set(node_id: str, name: str, value: object) -> dict[str, Any]:
    return {"id": node_id, "type": "set", "config": {"values": {name: value}}}


def _post(node_id: str, url: str, number: str) -> dict[str, Any]:
    config = {"method": "POST", "url": url, "body": {"number": number}}
    return {"id": node_id, "type": "http-request", "config": config}


def _plus_one(path: str) -> dict[str, Any]:
    return {"$op": "add", "args": [path, 1]}


def _chain(
    name: str, nodes: Sequence[Mapping[str, Any]], is_right: Callable[[int, Mapping[str, Any]], bool]
) -> Workflow:
    ids = [node["id"] for node in nodes]
    connections = [{"source": source, "target": target} for source, target in pairwise(ids)]
    return Workflow(name, nodes, connections, is_right)
