"""Workflows of the benchmarks, with the expected results for an input number `x`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LIGHT_NODES = 40


@dataclass(frozen=True, slots=True)
class BenchmarkWorkflow:
    """Graph of a workflow, and the check of its result."""

    name: str
    nodes: Sequence[Mapping[str, Any]]
    connections: Sequence[Mapping[str, str]]
    is_right: Callable[[int, Mapping[str, Any]], bool]
    """Whether these are the outputs, by node id, of a run that was given `x`."""


def pure_workflow() -> BenchmarkWorkflow:
    """Return a workflow that adds one and branches on whether the sum is even: three nodes run, one is skipped."""

    def is_right(x: int, outputs: Mapping[str, Any]) -> bool:
        taken, skipped = ("odd", "even") if x % 2 == 0 else ("even", "odd")
        said = outputs.get(taken)
        return skipped not in outputs and said is not None and (said["sum"], said["parity"]) == (x + 1, taken)

    nodes = [
        START,
        _set_node("add", "sum", _increment("{{ data.body.x }}")),
        {
            "id": "check",
            "type": "conditional",
            "config": {"condition": {"left": "{{ data.sum }}", "operator": "divisible-by", "right": 2}},
        },
        _set_node("even", "parity", "even"),
        _set_node("odd", "parity", "odd"),
    ]
    connections = [
        {"source": "start", "target": "add"},
        {"source": "add", "target": "check"},
        {"source": "check", "sourcePort": "true", "target": "even"},
        {"source": "check", "sourcePort": "false", "target": "odd"},
    ]
    return BenchmarkWorkflow("three pure nodes", nodes, connections, is_right)


def light_chain_workflow() -> BenchmarkWorkflow:
    """Return a workflow that adds one forty times, in nodes one after another."""

    def is_right(x: int, outputs: Mapping[str, Any]) -> bool:
        return bool(outputs[f"add-{LIGHT_NODES}"]["sum"] == x + LIGHT_NODES)

    first = _set_node("add-1", "sum", _increment("{{ data.body.x }}"))
    others = [
        _set_node(f"add-{number}", "sum", _increment("{{ data.sum }}"))
        for number in range(2, LIGHT_NODES + 1)
    ]
    return _build_chain("forty light nodes", [START, first, *others], is_right)


def three_writes_workflow(url: str) -> BenchmarkWorkflow:
    """Return a workflow that posts to `url` three times, each time the number of the last answer."""

    def is_right(x: int, outputs: Mapping[str, Any]) -> bool:
        return bool(outputs["third"]["body"] == {"number": x + 3})

    nodes = [
        START,
        _post_node("first", url, "{{ data.body.x }}"),
        _post_node("second", url, "{{ data.body.number }}"),
        _post_node("third", url, "{{ data.body.number }}"),
    ]
    return _build_chain("three writes", nodes, is_right)


START: Mapping[str, Any] = {"id": "start", "type": "manual"}


def _set_node(node_id: str, name: str, value: object) -> dict[str, Any]:
    return {"id": node_id, "type": "set", "config": {"values": {name: value}}}


def _post_node(node_id: str, url: str, number: str) -> dict[str, Any]:
    config = {"method": "POST", "url": url, "body": {"number": number}}
    return {"id": node_id, "type": "http-request", "config": config}


def _increment(path: str) -> dict[str, Any]:
    return {"$op": "add", "args": [path, 1]}


def _build_chain(
    name: str, nodes: Sequence[Mapping[str, Any]], is_right: Callable[[int, Mapping[str, Any]], bool]
) -> BenchmarkWorkflow:
    ids = [node["id"] for node in nodes]
    connections = [{"source": source, "target": target} for source, target in pairwise(ids)]
    return BenchmarkWorkflow(name, nodes, connections, is_right)
