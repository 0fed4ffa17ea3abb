"""Nodes that read and write files: objects of a bucket, blobs of the run, and the organization's folder."""

from __future__ import annotations

import copy
import errno
import os
from base64 import b64decode
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from engine.run_errors import NodeError
from engine.services import MailServerService, ObjectBucket, RunCaller, SqlDatabase, ToolServerService
from engine.values import Json
from execution.node_blobs import NodeBlobs
from journal.blobs.blob_store_factory import open_blobs
from models.settings import ServerSettings
from nodes import catalog
from nodes.connections import organization_folders
from nodes.connections.data_source import ConnectionSource
from nodes.connections.data_source_policy import ConnectionPolicy
from nodes.connections.organization_folders import OrganizationFolders
from nodes.connections.s3_bucket import open_bucket
from tests import fake_s3
from tests.fake_s3 import FakeObject, FakeS3
from tests.node_calls import CALLER, CallRecord, call

CITIES = b"city,celsius\nOslo,12.5\nRome,27\n"
ROWS: Json = [{"city": "Oslo", "celsius": 12.5}, {"city": "Rome", "celsius": 27}]
TABLE = {"columns": ["city", "celsius"], "rows": ROWS, "count": 2}
NODES = ("s3-source", "s3-destination", "file-source", "file-destination", "file-parse")
WORKBOOK = b64decode(catalog.load_catalog().get("excel-parse").examples[0]["input"]["attachment"])  # type: ignore[arg-type,call-overload,index]  # an example is JSON


@dataclass
class FileStores:
    """A bucket, a folder of blobs, and one of files."""

    s3: FakeS3
    blobs: NodeBlobs
    files: OrganizationFolders
    folder: Path
    """Location of those files."""

    async def call(self, node_type: str, config: Mapping[str, Json], data: Json = None) -> CallRecord:
        if node_type.startswith("s3-"):
            config = {"dataSource": "ds_001", **config}
        return await call(node_type, config, data, data_sources=self, blobs=self.blobs, files=self.files)

    async def refused(self, node_type: str, config: Mapping[str, Json], data: Json = None) -> str:
        with pytest.raises(NodeError) as raised:
            await self.call(node_type, config, data)
        return raised.value.code

    async def put(self, content: bytes, *, media_type: str = "", name: str = "") -> dict[str, Json]:
        return await self.blobs.put(CALLER, content, media_type=media_type, name=name)

    # ── as data sources ───────────────────────────────────────────────────────────────────────────────────

    async def bucket(self, caller: RunCaller, source_id: str) -> ObjectBucket:
        assert (caller, source_id) == (CALLER, "ds_001")
        settings: dict[str, Json] = {
            "bucket": "bucket",
            "region": self.s3.region,
            "endpoint": self.s3.url,
            "accessKeyId": self.s3.access_key_id,
        }
        secrets = {"secretAccessKey": self.s3.secret_access_key}
        source = ConnectionSource(source_id, caller.organization_id, "s3", 1, settings, secrets)
        return await open_bucket(source, ConnectionPolicy(allowed_networks=(ip_network("127.0.0.0/8"),)))

    async def database(self, caller: RunCaller, source_id: str, type: str) -> SqlDatabase:  # noqa: A002 - the field's own word
        raise AssertionError(f"{caller} asked for {type} {source_id}")

    async def mail_server(self, caller: RunCaller, source_id: str) -> MailServerService:
        raise AssertionError(f"{caller} asked for the mail server {source_id}")

    async def tool_server(self, caller: RunCaller, source_id: str) -> ToolServerService:
        raise AssertionError(f"{caller} asked for the mail server {source_id}")

    async def headers(self, caller: RunCaller, source_id: str, url: str) -> Mapping[str, str]:
        raise AssertionError(f"{caller} asked for what {source_id} sends to {url}")


@pytest.fixture
async def file_stores(tmp_path: Path) -> AsyncIterator[FileStores]:
    blobs = open_blobs(ServerSettings(data_dir=tmp_path))
    files = OrganizationFolders(tmp_path / "files")
    async with fake_s3.serve_fake_s3() as s3:
        yield FileStores(s3, NodeBlobs(blobs), files, tmp_path / "files/org_1/objects")
    files.close()
    await blobs.close()


@pytest.mark.parametrize(
    ("node_type", "example"),
    [(name, example) for name in NODES for example in catalog.load_catalog().get(name).examples],
)
async def test_every_example_comes_true(
    file_stores: FileStores, node_type: str, example: dict[str, Any]
) -> None:
    await file_stores.put(CITIES, media_type="text/csv", name="cities.csv")
    if node_type == "file-source":
        await file_stores.call("file-destination", {"key": "cities.csv", "content": CITIES.decode()})
    if node_type == "s3-source":
        file_stores.s3.objects["cities.csv"] = FakeObject(CITIES, {}, datetime(2026, 1, 1, tzinfo=UTC))
    data = copy.deepcopy(example["input"])
    called = await file_stores.call(node_type, example["config"], data)
    assert called.output == example["output"]
    assert data == example["input"]
    if node_type == "s3-destination":
        stored = file_stores.s3.objects[example["output"]["key"]]
        assert stored.headers["Content-Type"] == example["output"]["contentType"]


# ── formats ───────────────────────────────────────────────────────────────────────────────────────────────

FILES: list[tuple[bytes, str, str, dict[str, Any]]] = [
    (CITIES, "a.csv", "csv", TABLE),
    (CITIES.replace(b",", b"\t"), "A.TSV", "csv", TABLE),
    (b"\xef\xbb\xbf" + CITIES, "a.csv", "csv", TABLE),
    (b'{"a":1}', "a.json", "json", {"value": {"a": 1}}),
    (b' [1,"\xc3\xbc"]', "a", "json", {"value": [1, "ü"]}),
    (b'{"a":1}\n{"a":2}\n', "a.ndjson", "json-lines", {"value": [{"a": 1}, {"a": 2}]}),
    (b"<?xml version='1.0'?><a><b>1</b></a>", "a", "xml", {"root": "a", "value": {"b": "1"}}),
    (b"<a>1</a>", "a.xml", "xml", {"root": "a", "value": "1"}),
    (b"hello", "a.txt", "text", {"text": "hello"}),
    (b"", "a", "text", {"text": ""}),
    (
        WORKBOOK,
        "a",
        "excel",
        {
            "rows": [{"city": "Oslo", "celsius": 12.5}],
            "columns": ["city", "celsius"],
            "count": 1,
            "sheet": "Cities",
            "sheets": ["Cities"],
        },
    ),
]


@pytest.mark.parametrize(("content", "name", "format", "output"), FILES)
async def test_a_file_is_parsed_by_its_detected_format(
    file_stores: FileStores,
    content: bytes,
    name: str,
    format: str,  # noqa: A002 - the field's own word
    output: dict[str, Any],
) -> None:
    expected = {"format": format, **output}
    reference = await file_stores.put(content, name=name)
    for wanted in ("auto", format):
        config: dict[str, Json] = {"blob": "{{ data.file }}", "format": wanted}
        called = await file_stores.call("file-parse", config, {"file": reference})
        assert called.output == expected
    file_stores.s3.objects[name] = FakeObject(content, {})
    wanted = "excel" if format == "excel" else "auto"
    called = await file_stores.call("s3-source", {"key": name, "as": wanted})
    assert called.output == {"key": name, "size": len(content), **expected}


async def test_the_type_of_a_file_counts_where_its_name_says_nothing(file_stores: FileStores) -> None:
    reference = await file_stores.put(CITIES, media_type="text/csv; charset=utf-8", name="export")
    assert (await file_stores.call("file-parse", {"blob": reference})).output == {"format": "csv", **TABLE}


async def test_options_go_to_the_node_of_the_format(file_stores: FileStores) -> None:
    reference = await file_stores.put("stadt;grad\nKöln;007\n".encode("windows-1252"), name="a.csv")
    config: dict[str, Json] = {
        "blob": "{{ data }}",
        "encoding": "windows-1252",
        "csv": {"delimiter": ";", "types": "text"},
    }
    called = await file_stores.call("file-parse", config, reference)
    assert called.output == {
        "format": "csv",
        "rows": [{"stadt": "Köln", "grad": "007"}],
        "columns": ["stadt", "grad"],
        "count": 1,
    }
    assert await file_stores.refused("file-parse", {"blob": reference}) == "invalid-encoding"


@pytest.mark.parametrize(
    ("content", "name", "code"),
    [
        (b'{"a":', "a.json", "invalid-json"),
        (b"a,b\n1\n", "a.csv", "ragged-row"),
        (b"<a>", "a.xml", "invalid-xml"),
        (b"<!DOCTYPE a><a/>", "a.xml", "document-type-refused"),
        (b"PK\x03\x04", "a.xlsx", "invalid-workbook"),
    ],
)
async def test_a_corrupted_file_is_reported_with_its_error(
    file_stores: FileStores, content: bytes, name: str, code: str
) -> None:
    reference = await file_stores.put(content, name=name)
    assert await file_stores.refused("file-parse", {"blob": reference}) == code


async def test_no_node_reads_a_file_of_another_run(file_stores: FileStores) -> None:
    other = RunCaller("org_1", "user_1", "wf_1", "exec_2", "exec_2")
    reference = await file_stores.blobs.put(other, CITIES, media_type="text/csv")
    assert await file_stores.refused("file-parse", {"blob": "{{ data }}"}, reference) == "blob-not-found"
    config: dict[str, Json] = {"key": "a", "content": "{{ data }}"}
    assert await file_stores.refused("s3-destination", config, reference) == "blob-not-found"
    assert file_stores.s3.objects == {}


# ── objects ───────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_file_goes_through_a_run_as_it_is(file_stores: FileStores) -> None:
    raw = bytes(range(256)) * 1_000
    file_stores.s3.objects["in/bild.png"] = FakeObject(raw, {})
    fetched = (await file_stores.call("s3-source", {"key": "in/bild.png"})).output
    assert isinstance(fetched, dict)
    assert (fetched["format"], fetched["size"]) == ("blob", len(raw))
    config: dict[str, Json] = {"key": "out/bild.png", "content": "{{ data.blob }}"}
    written = await file_stores.call("s3-destination", config, fetched)
    stored = file_stores.s3.objects["out/bild.png"]
    assert (stored.content, stored.headers["Content-Type"]) == (raw, "image/png")
    assert written.output == {
        "key": "out/bild.png",
        "size": len(raw),
        "etag": stored.etag.strip('"'),
        "contentType": "image/png",
    }


@pytest.mark.parametrize(
    ("config", "content", "media_type"),
    [
        ({"content": {"ü": [1, None]}}, '{"ü":[1,null]}', "application/json"),
        ({"content": "text {{ data }}"}, "text x", "text/plain; charset=utf-8"),
        ({"content": "x", "format": "json"}, '"x"', "application/json"),
        ({"content": [1, {"a": 2}], "format": "json-lines"}, '1\n{"a":2}\n', "application/x-ndjson"),
        ({"content": [{"a": 1}], "format": "csv"}, "a\n1\n", "text/csv; charset=utf-8"),
        ({"content": [{"a": "=1"}], "format": "csv"}, "a\n'=1\n", "text/csv; charset=utf-8"),
        (
            {"content": [{"a": 1, "b": 2}], "format": "csv", "csv": {"delimiter": ";", "columns": ["b"]}},
            "b\n2\n",
            "text/csv; charset=utf-8",
        ),
        ({"content": "<a/>", "contentType": "application/xml"}, "<a/>", "application/xml"),
        ({}, "x", "text/plain; charset=utf-8"),
    ],
)
async def test_a_value_is_written_in_a_format(
    file_stores: FileStores, config: dict[str, Json], content: str, media_type: str
) -> None:
    for _ in range(2):
        await file_stores.call("s3-destination", {"key": "a", **config}, "x")
    stored = file_stores.s3.objects["a"]
    assert (stored.content.decode(), stored.headers["Content-Type"]) == (content, media_type)


@pytest.mark.parametrize(
    ("node_type", "config", "code"),
    [
        ("s3-source", {"key": "absent"}, "object-not-found"),
        ("s3-source", {"key": "../a"}, "invalid-key"),
        ("s3-source", {"key": "large", "maxBytes": 99}, "object-too-large"),
        ("s3-source", {"key": "large", "as": "json"}, "invalid-json"),
        ("s3-source", {"prefix": "", "maxObjects": 1}, "too-many-objects"),
        ("s3-destination", {"key": "a", "content": {}, "format": "csv"}, "invalid-config"),
        ("s3-destination", {"key": "a", "content": 1, "format": "text"}, "invalid-config"),
        ("s3-destination", {"key": "a", "content": {"$blob": "../x"}}, "invalid-blob"),
        ("s3-destination", {"key": "a", "contentType": "a\nb: c"}, "invalid-request"),
    ],
)
async def test_a_refused_file_operation_has_an_error_code_of_its_own(
    file_stores: FileStores, node_type: str, config: dict[str, Json], code: str
) -> None:
    file_stores.s3.objects.update({"large": FakeObject(b"x" * 100, {}), "other": FakeObject(b"", {})})
    assert await file_stores.refused(node_type, config) == code
    assert "a" not in file_stores.s3.objects


def test_the_catalogue_finds_a_config_that_names_neither_object_nor_prefix() -> None:
    library = catalog.load_catalog()
    (problem,) = library.config_problems(library.get("s3-source"), {"dataSource": "ds_001"})
    assert problem.message == "key or prefix is required"


# ── the organization's own folder ─────────────────────────────────────────────────────────────────────────


async def test_files_come_back_and_are_listed_by_their_paths(file_stores: FileStores) -> None:
    for key in ("b.txt", "deep/er/ü 1.txt"):
        await file_stores.call("file-destination", {"key": key, "content": key})
        called = await file_stores.call("file-source", {"key": key})
        assert called.output == {"key": key, "size": len(key.encode()), "format": "text", "text": key}
    called = await file_stores.call("file-source", {"prefix": "deep/"})
    assert isinstance(called.output, dict)
    assert [one["key"] for one in called.output["objects"]] == ["deep/er/ü 1.txt"]  # type: ignore[union-attr,index,call-overload]  # JSON
    modes = {path.stat().st_mode & 0o777 for path in file_stores.folder.rglob("*")}
    assert modes == {0o600, 0o700}


@pytest.mark.parametrize(
    "key",
    [
        "../secret",
        "a/../../secret",
        "/etc/passwd",
        ".hidden",
        "a/.hidden",
        "a//b",
        "",
        "a\n",
        "x" * 256,
        "a/.",
    ],
)
async def test_no_path_leads_out_of_the_folder(file_stores: FileStores, key: str) -> None:
    (file_stores.folder.parent / "secret").parent.mkdir(parents=True)
    (file_stores.folder.parent / "secret").write_text("another")
    for node_type in ("file-source", "file-destination"):
        assert await file_stores.refused(node_type, {"key": key}, "x") == "invalid-key"
    assert (file_stores.folder.parent / "secret").read_text() == "another"


async def test_no_link_is_followed_and_nothing_but_a_file_is_read(
    file_stores: FileStores, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("another's")
    await file_stores.call("file-destination", {"key": "a/b.txt", "content": "ours"})
    (file_stores.folder / "link").symlink_to(tmp_path / "secret")
    (file_stores.folder / "linked").symlink_to(tmp_path)
    os.mkfifo(file_stores.folder / "pipe")
    for key in ("link", "linked/secret", "a", "pipe", "a/b.txt/c"):
        assert await file_stores.refused("file-source", {"key": key}) == "invalid-key"
    assert (
        await file_stores.refused("file-destination", {"key": "linked/secret", "content": "x"})
        == "invalid-key"
    )
    await file_stores.call("file-destination", {"key": "link", "content": "x"})
    assert (tmp_path / "secret").read_text() == "another's", "the link itself was replaced"
    called = await file_stores.call("file-source", {"prefix": ""})
    assert isinstance(called.output, dict)
    assert called.output["count"] == 2


async def test_another_organisation_has_another_folder(file_stores: FileStores) -> None:
    await file_stores.call("file-destination", {"key": "a.txt", "content": "ours"})
    folder = await file_stores.files.folder(RunCaller("org_2", "user_1", "wf_1", "exec", "exec"))
    with pytest.raises(NodeError) as raised:
        await folder.get("a.txt", max_bytes=10, timeout_seconds=5)
    assert raised.value.code == "object-not-found"
    assert await folder.list("", max_objects=10, timeout_seconds=5) == []


async def test_a_file_is_replaced_whole_or_not_at_all(
    file_stores: FileStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    await file_stores.call("file-destination", {"key": "a.txt", "content": "first"})

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert (
        await file_stores.refused("file-destination", {"key": "a.txt", "content": "second"})
        == "not-available"
    )
    assert [path.name for path in file_stores.folder.iterdir()] == ["a.txt"]
    assert (file_stores.folder / "a.txt").read_text() == "first"


async def test_a_folder_has_room_for_so_much_and_no_more(
    file_stores: FileStores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(organization_folders, "MAX_FOLDER_BYTES", 10)
    await file_stores.call("file-destination", {"key": "a", "content": "12345"})
    assert await file_stores.refused("file-destination", {"key": "b", "content": "123456"}) == "folder-full"
    monkeypatch.setattr(organization_folders, "MAX_FILES", 1)
    assert await file_stores.refused("file-destination", {"key": "c", "content": "1"}) == "folder-full"
    for key, content in (("a", "123456"), ("a", "12345")):
        await file_stores.call("file-destination", {"key": key, "content": content})
    assert await file_stores.refused("file-source", {"key": "a", "maxBytes": 4}) == "object-too-large"
