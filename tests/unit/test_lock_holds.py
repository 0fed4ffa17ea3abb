"""No text within the limits holds the GIL for long."""

from __future__ import annotations

import gc
import time
from functools import partial
from typing import Annotated, Any

import msgspec
import pytest

from engine import canvas_layout, values
from engine.graph import ParsedGraph
from engine.validation import validate_graph
from engine.values import InvalidJson, Json
from gateway.http import limits
from gateway.http.errors import ApiError
from gateway.http.wire import WireStruct, convert
from gateway.workflows import graph_difference
from nodes import catalog
from tests import hostile_json, lock_holds
from tests.hostile_json import TEXTS

MEGABYTE = 1_000_000
CATALOG = catalog.load_catalog()


def go_through(text: bytes) -> None:
    """Process a text like bodies, outputs and rows."""
    try:
        value: Json = values.decode_json(text)
    except InvalidJson:
        return
    raw = values.encode_json(value)
    values.fingerprint(value)
    assert values.equal_json(value, values.restore_json(raw))


@pytest.mark.parametrize("name", TEXTS)
def test_a_body_of_a_megabyte_does_not_block_other_requests(name: str) -> None:
    text = TEXTS[name](MEGABYTE)
    assert not lock_holds.holds_longer(partial(go_through, text), lock_holds.MEGABYTE_SECONDS)


def test_a_larger_text_is_decoded_in_pieces() -> None:
    """Apart from collections of garbage, the longest step doesn't depend on the length."""
    text = TEXTS["nested lists"](2 * MEGABYTE)
    gc.disable()
    decoded: list[Json] = []  # Deallocation is not measured.
    try:
        assert not lock_holds.holds_longer(
            lambda: decoded.append(values.decode_json(text)), lock_holds.MEGABYTE_SECONDS
        )
    finally:
        gc.enable()


def test_a_list_that_is_too_long_is_refused_at_a_glance() -> None:
    class TextBody(WireStruct):
        items: Annotated[list[dict[str, int]], msgspec.Meta(max_length=3)]

    body = values.decode_json(b'{"items":%s}' % hostile_json.list_of(b'{"a":1.0}', 5 * MEGABYTE))
    began_at = time.thread_time()
    with pytest.raises(ApiError) as caught:
        convert(body, TextBody)
    assert time.thread_time() - began_at < 0.3
    assert [problem["path"] for problem in caught.value.details] == ["items"]


def test_the_largest_graph_is_checked_arranged_and_compared_step_by_step() -> None:
    ids = [f"n{number}" for number in range(limits.NODES)]
    pairs = [(number - 1 - number % 7 if number > 7 else 0, number) for number in range(1, limits.NODES)]
    pairs += [(number, number + 9) for number in range(limits.CONNECTIONS - len(pairs) - 10)]
    nodes: list[Any] = [
        {
            "id": node_id,
            "type": "set",
            "label": "A step",
            "config": {"values": {"a": "{{ data.b }}", "c": [1]}},
        }
        for node_id in ids
    ]
    nodes[0] |= {"type": "manual", "config": {}}
    connections: list[Any] = [
        {"id": f"c{number}", "source": ids[source], "target": ids[target]}
        for number, (source, target) in enumerate(pairs)
    ]

    def go_through_graph() -> None:
        validation = validate_graph(
            ParsedGraph.from_stored({"nodes": nodes, "connections": connections}), CATALOG
        )
        places = canvas_layout.arrange_cards(
            ids, [(ids[source], ids[target]) for source, target in pairs], [None] * len(ids)
        )
        after = [{**node, "position": place} for node, place in zip(nodes, places, strict=True)]
        difference = graph_difference.compare_items(nodes, after)
        shown = msgspec.json.format(msgspec.json.encode([after, connections, difference]))
        assert validation.is_valid
        assert len(difference.changed) == limits.NODES
        assert len(shown) > MEGABYTE

    assert not lock_holds.holds_longer(go_through_graph, lock_holds.LIMIT_SECONDS)
