import asyncio
import base64
import gc
import io
import json
import zipfile
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from engine.node_api import NodeType
from engine.run_errors import NodeError
from engine.values import Json, encode_json
from nodes import catalog
from nodes.sandbox import pooled_catalog
from nodes.sandbox.pooled_catalog import IN_PLACE_BYTES, PooledCatalog
from nodes.sandbox.processes import ProcessKind, ProcessPool
from tests.loop_heartbeat import measure_heartbeat
from tests.node_calls import call

pytestmark = pytest.mark.anyio

LONGEST_DELAY_SECONDS = 0.2
CPU_TYPES = {kind: each for kind, each in catalog.load_catalog().node_types.items() if each.cpu}
EXAMPLES = [
    pytest.param(node_type, example, id=f"{node_type.type}-{number}")
    for node_type in CPU_TYPES.values()
    for number, example in enumerate(node_type.examples)
]


@pytest.fixture(scope="module")
async def shared() -> AsyncIterator[PooledCatalog]:
    processes = ProcessPool(ProcessKind.LIBRARY, limit=2)
    yield PooledCatalog(catalog.load_catalog().node_types, processes)
    await processes.close()


@pytest.mark.parametrize(("node_type", "example"), EXAMPLES)
async def test_an_example_comes_true_in_a_child_too(
    node_type: NodeType, example: dict[str, Any], shared: PooledCatalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pooled_catalog, "IN_PLACE_BYTES", 0)
    if "error" in example:
        with pytest.raises(NodeError) as raised:
            await call(node_type.type, example["config"], example["input"], library=shared)
        assert raised.value.message == example["error"]
        return
    called = await call(node_type.type, example["config"], example["input"], library=shared)
    assert (called.output, called.port) == (example["output"], example["port"])


def encode_workbook(rows: int, encoding: str = "utf-8") -> str:
    relation = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    cells = "".join(f'<row><c><v>{n}</v></c><c t="str"><v>é{n}</v></c></row>' for n in range(rows))
    head = f'<?xml version="1.0" encoding="{encoding}"?>'
    parts = {
        "_rels/.rels": f'<a><Relationship Id="r" Type="{relation}/officeDocument" Target="w.xml"/></a>',
        "w.xml": '<a><sheets><sheet name="One" id="r"/></sheets></a>',
        "_rels/w.xml.rels": f'<a><Relationship Id="r" Type="{relation}/worksheet" Target="é.xml"/></a>',
        "é.xml": f"{head}<worksheet><sheetData>{cells}</sheetData></worksheet>",
    }
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part.encode(encoding if name == "é.xml" else "utf-8"))
    return base64.b64encode(written.getvalue()).decode()


PAGE = "".join(f"<div class='c{n % 7}'><a href='/{n}'>é{n}</a></div>" for n in range(3_000))
CONFIGS: list[tuple[str, dict[str, Json]]] = [
    ("csv-parse", {"text": "a;b\n" + "".join(f"{n};é{n}\n" for n in range(20_000)), "delimiter": "auto"}),
    ("csv-parse", {"text": "a,b\n" + "1,2,3\n" * 2_000}),
    ("xml-parse", {"text": "<r>" + "".join(f"<i n='{n}'>é</i>" for n in range(10_000)) + "</r>"}),
    ("xml-parse", {"text": "<r>" * 2_000}),
    ("json-parse", {"text": json.dumps({"a": [{"n": n, "big": 10**300} for n in range(2_000)]})}),
    ("json-parse", {"text": "[" * 5_000}),
    ("json-parse", {"text": '{"a": "\\u0000' + "x" * 5_000 + '"}'}),
    ("excel-parse", {"file": encode_workbook(3_000), "hasHeader": False}),
    ("excel-parse", {"file": encode_workbook(20, "windows-1252"), "hasHeader": False}),
    ("excel-parse", {"file": "AAAA"}),
    (
        "html-extract",
        {"html": PAGE, "items": ".c1", "fields": {"at": {"selector": "a", "attribute": "href"}}},
    ),
    ("html-extract", {"html": PAGE, "fields": {"no": {"selector": "b"}}}),
    ("regex", {"text": "äöü " * 10_000, "pattern": "(?P<all>ö)", "operation": "find-all"}),
    ("regex", {"text": "a", "pattern": "("}),
]


@pytest.mark.parametrize(("kind", "config"), CONFIGS)
async def test_a_result_is_that_of_a_run_in_place(
    kind: str, config: dict[str, Json], shared: PooledCatalog
) -> None:
    outcomes: list[object] = []
    for library in (catalog.load_catalog(), shared):
        try:
            called = await call(kind, config, library=library)
            outcomes.append((called.output, called.port, called.unresolved))
        except NodeError as error:
            outcomes.append((error.code, error.message, error.retryable))
    assert outcomes[0] == outcomes[1]


async def test_an_output_that_is_too_large_is_no_output(shared: PooledCatalog) -> None:
    with pytest.raises(NodeError) as raised:
        await call("csv-parse", {"text": "x" * 1_000 + "\n1" * 10_000}, library=shared)
    assert raised.value.code == "output-too-large"
    assert "PILOTFLAME_MAX_OUTPUT_BYTES" in str(raised.value)


LARGE: dict[str, Callable[[], str]] = {
    "json-parse": lambda: json.dumps([{"id": n, "tags": ["a" * 60, "b"]} for n in range(90_000)]),
    "csv-parse": lambda: "a,n\n" + f"{'x' * 110},1\n" * 75_000,
}


@pytest.mark.parametrize("kind", LARGE)
async def test_a_body_of_ten_megabytes_does_not_block_other_requests(
    kind: str, shared: PooledCatalog
) -> None:
    config: dict[str, Json] = {"text": LARGE[kind]()}
    assert len(encode_json(config)) > 8_000_000
    await call("regex", {"text": "a", "pattern": "a"}, library=shared)
    run = shared.implementation(kind)
    assert asyncio.iscoroutinefunction(run)
    gc.freeze()  # as a worker does when it is ready
    async with measure_heartbeat() as heartbeat:
        await call(kind, config, library=shared)
    assert heartbeat.longest_delay_seconds < LONGEST_DELAY_SECONDS


@pytest.mark.parametrize("kind", sorted(CPU_TYPES))
def test_a_node_for_a_child_needs_nothing_but_its_config(kind: str) -> None:
    assert CPU_TYPES[kind].compiled == {}
    assert CPU_TYPES[kind].outputs == ("output",)
    assert IN_PLACE_BYTES < 10_000
