"""Blob store on a folder and on a bucket: both give the same guarantees."""

from __future__ import annotations

import asyncio
import os
import stat
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from pydantic import SecretStr

from engine.run_errors import NodeError
from engine.services import RunCaller
from execution.node_blobs import NodeBlobs
from journal.blobs import orphan_blobs
from journal.blobs.blob_reference import BlobReference, InvalidBlobReference
from journal.blobs.blob_storage import BlobLost, BlobOwner, BlobsUnavailable
from journal.blobs.blob_store import BlobStore, BlobTooLarge
from journal.blobs.blob_store_factory import open_blobs
from journal.blobs.folder_storage import FolderBlobStorage
from models.database import Database, parse_url
from models.settings import InvalidSettings, ServerSettings
from tests import fake_s3
from tests.integration.run_database import MigratedDatabase, open_run_database

LARGE = b'"' + b"x" * 3_000_000 + b'"'
OURS = BlobOwner("org_ours", "exec_1")
FORGED = [
    "../../../etc/passwd",
    "0" * 63,
    "0" * 65,
    "A" * 64,
    "0" * 64 + "\n",
    "..%2f" + "0" * 59,
    "",
]


def bucket_settings(s3: fake_s3.FakeS3, **changes: Any) -> ServerSettings:  # noqa: ANN401 - fields of the settings
    fields: dict[str, Any] = {
        "blob_url": "s3://bucket/kept/here",
        "blob_s3_endpoint": s3.url,
        "blob_s3_region": s3.region,
        "blob_s3_access_key_id": s3.access_key_id,
        "blob_s3_secret_access_key": SecretStr(s3.secret_access_key),
    }
    return ServerSettings(**fields | changes)


@pytest.fixture
async def s3() -> AsyncIterator[fake_s3.FakeS3]:
    async with fake_s3.serve_fake_s3() as s3:
        yield s3


@pytest.fixture(params=["folder", "bucket"])
async def blobs(
    request: pytest.FixtureRequest, tmp_path: Path, s3: fake_s3.FakeS3
) -> AsyncIterator[BlobStore]:
    settings = ServerSettings(data_dir=tmp_path) if request.param == "folder" else bucket_settings(s3)
    blobs = open_blobs(settings)
    yield blobs
    await blobs.close()


async def put(blobs: BlobStore, owner: BlobOwner = OURS, content: bytes = LARGE) -> BlobReference:
    return await blobs.put(owner, content, media_type="text/csv", name="räume.csv")


# ── guarantees of both ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("content", [LARGE, b"", b"\n{}\n\x00"])
async def test_a_content_comes_back_as_it_was_put_with_its_label(blobs: BlobStore, content: bytes) -> None:
    reference = await put(blobs, content=content)
    assert reference == BlobReference(sha256(content).hexdigest(), len(content), "text/csv", "räume.csv")
    assert await blobs.get(OURS, reference.sha256) == content
    async with blobs.open(OURS, reference.sha256) as opened_content:
        assert (opened_content.size, opened_content.label.type) == (len(content), "text/csv")
        assert opened_content.label.name == "räume.csv"


@pytest.mark.parametrize("owner", [BlobOwner("org_ours", "exec_2"), BlobOwner("org_theirs", "exec_1")])
async def test_a_content_hash_finds_nothing_for_other_owners(blobs: BlobStore, owner: BlobOwner) -> None:
    reference = await put(blobs)
    with pytest.raises(BlobLost):
        await blobs.get(owner, reference.sha256)
    await blobs.delete_all([owner])
    assert await blobs.get(OURS, reference.sha256) == LARGE


@pytest.mark.parametrize("hash_of_it", FORGED)
async def test_a_malformed_hash_leads_nowhere(blobs: BlobStore, hash_of_it: str) -> None:
    with pytest.raises(BlobLost):
        await blobs.get(OURS, hash_of_it)


@pytest.mark.parametrize(
    "owner", [BlobOwner("..", "exec_1"), BlobOwner("org_ours", "../exec_2"), BlobOwner("", "a")]
)
async def test_an_owner_is_named_by_ids_and_by_nothing_that_is_a_path(
    blobs: BlobStore, owner: BlobOwner
) -> None:
    for use in (blobs.get(owner, "0" * 64), put(blobs, owner), blobs.delete_all([owner])):
        with pytest.raises(ValueError, match="two ids"):
            await use


async def test_more_than_was_asked_for_is_not_even_read(blobs: BlobStore) -> None:
    reference = await put(blobs)
    with pytest.raises(BlobTooLarge):
        await blobs.get(OURS, reference.sha256, max_bytes=len(LARGE) - 1)
    assert await blobs.get(OURS, reference.sha256, max_bytes=len(LARGE)) == LARGE


async def test_contents_go_with_their_run_and_may_be_deleted_twice(blobs: BlobStore) -> None:
    reference, other = await put(blobs), await put(blobs, BlobOwner("org_ours", "exec_2"))
    for _ in range(2):
        await blobs.delete_all([OURS])
    with pytest.raises(BlobLost):
        await blobs.get(OURS, reference.sha256)
    assert await blobs.get(BlobOwner("org_ours", "exec_2"), other.sha256) == LARGE


async def test_the_same_content_may_be_put_by_several_at_once(blobs: BlobStore) -> None:
    references = await asyncio.gather(*(put(blobs) for _ in range(6)))
    assert len(set(references)) == 1
    assert await blobs.get(OURS, references[0].sha256) == LARGE


@pytest.mark.parametrize(
    ("media_type", "name", "kept"),
    [
        ("text/html; charset=utf-8", "a.html", ("text/html; charset=utf-8", "a.html")),
        ("text/html\r\nSet-Cookie: a=b", "../../etc/pass\r\nwd", ("application/octet-stream", "passwd")),
        ("", "c:\\temp\\\u2028b.csv", ("application/octet-stream", "b.csv")),
        ("x/" + "y" * 300, "z" * 300, ("application/octet-stream", "z" * 255)),
    ],
)
async def test_names_and_types_from_outside_are_mere_labels(
    blobs: BlobStore, media_type: str, name: str, kept: tuple[str, str]
) -> None:
    reference = await blobs.put(OURS, b"x", media_type=media_type, name=name)
    assert (reference.type, reference.name) == kept
    assert (
        BlobReference.from_value(reference.as_json())
        == BlobReference.from_text(reference.as_text())
        == reference
    )


# ── guarantees of a folder ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def folder_blobs(tmp_path: Path) -> AsyncIterator[BlobStore]:
    blobs = open_blobs(ServerSettings(data_dir=tmp_path))
    yield blobs
    await blobs.close()


def blob_files(tmp_path: Path) -> Sequence[Path]:
    return [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]


async def test_files_belong_to_the_process_alone_and_none_is_left_unfinished(
    folder_blobs: BlobStore, tmp_path: Path
) -> None:
    before = os.umask(0)
    try:
        reference = await put(folder_blobs)
    finally:
        os.umask(before)
    (kept,) = blob_files(tmp_path)
    assert kept == tmp_path / "blobs/org_ours/exec_1" / reference.sha256
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (kept, *kept.parents[:3])]
    assert modes == [0o600, 0o700, 0o700, 0o700]


async def test_a_content_is_on_the_disk_before_its_name_is_and_the_name_before_the_answer(
    folder_blobs: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        done.append("file" if stat.S_ISREG(os.fstat(descriptor).st_mode) else "folder")
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        done.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    await put(folder_blobs)
    assert done == ["folder", "file", "rename", "folder", "folder", "folder"], "the root has its name first"
    done.clear()
    await put(folder_blobs)
    assert "rename" not in done, "a shared content is written once"
    assert done.count("folder") == 3, "whoever wrote it first may not have come to that"


@pytest.mark.parametrize("spoilt", [b"", b"no label", b'{"type":"a/b","name":""}\nother'])
async def test_a_spoilt_content_is_never_given_out_and_is_mended_by_the_next_put(
    folder_blobs: BlobStore, tmp_path: Path, spoilt: bytes
) -> None:
    reference = await put(folder_blobs)
    (kept,) = blob_files(tmp_path)
    kept.write_bytes(spoilt)
    with pytest.raises(BlobLost):
        await folder_blobs.get(OURS, reference.sha256)
    await put(folder_blobs)
    assert await folder_blobs.get(OURS, reference.sha256) == LARGE


async def test_a_link_in_the_place_of_a_content_is_not_followed(
    folder_blobs: BlobStore, tmp_path: Path
) -> None:
    reference = await put(folder_blobs)
    (kept,) = blob_files(tmp_path)
    kept.rename(tmp_path / "elsewhere")
    kept.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BlobsUnavailable):
        await folder_blobs.get(OURS, reference.sha256)


async def test_a_folder_that_can_t_be_written_is_unavailable_and_no_surprise(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("in the way")
    blobs = BlobStore(FolderBlobStorage(tmp_path / "blobs"))
    with pytest.raises(BlobsUnavailable):
        await put(blobs)
    await blobs.close()


# ── guarantees of a bucket ──────────────────────────────────────────────────────────────────────────────────


async def test_a_bucket_that_refuses_or_stays_silent_is_unavailable(
    s3: fake_s3.FakeS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = open_blobs(bucket_settings(s3, blob_s3_secret_access_key=SecretStr("another")))
    with pytest.raises(BlobsUnavailable):
        await put(blobs)
    monkeypatch.setattr("journal.blobs.blob_store.TRANSFER_SECONDS", 0.2)
    s3.is_silent = True
    with pytest.raises(BlobsUnavailable):
        await put(blobs)


async def test_objects_carry_their_type_and_stand_below_the_prefix(s3: fake_s3.FakeS3) -> None:
    reference = await put(open_blobs(bucket_settings(s3)))
    ((key, stored),) = s3.objects.items()
    assert key == f"kept/here/org_ours/exec_1/{reference.sha256}"
    assert stored.headers["Content-Type"] == "text/csv"


@pytest.mark.parametrize("url", ["https://bucket", "s3://", "s3://UPPER", "s3://a/b c", "s3://bucket/a?b"])
def test_an_address_that_names_no_bucket_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(InvalidSettings, match="PILOTFLAME_BLOB_URL"):
        open_blobs(ServerSettings(blob_url=url))


# ── blobs in nodes ──────────────────────────────────────────────────────────────────────────────────────────


def make_caller(organization_id: str = "org_ours", key_id: str = "exec_1") -> RunCaller:
    return RunCaller(organization_id, "user_1", "wf_1", f"exec_{uuid4().hex}", key_id)


async def test_a_node_reads_only_blobs_of_its_own_family_of_runs(blobs: BlobStore) -> None:
    services = NodeBlobs(blobs)
    reference = await services.put(make_caller(), b"rows", media_type="text/csv", name="rows.csv")
    assert reference == {
        "$blob": {"sha256": sha256(b"rows").hexdigest(), "size": 4, "type": "text/csv", "name": "rows.csv"}
    }
    assert await services.get(make_caller(), reference, max_bytes=4) == b"rows"
    for other in (make_caller("org_theirs"), make_caller(key_id="exec_2")):
        with pytest.raises(NodeError) as raised:
            await services.get(other, reference, max_bytes=4)
        assert (raised.value.code, raised.value.retryable) == ("blob-not-found", False)
    with pytest.raises(NodeError) as raised:
        await services.get(make_caller(), reference, max_bytes=3)
    assert raised.value.code == "blob-too-large"


@pytest.mark.parametrize(
    "forged",
    [
        None,
        "0" * 64,
        {"sha256": "0" * 64, "size": 1},
        {"$blob": "0" * 64},
        {"$blob": {"sha256": "../../x", "size": 1}},
        {"$blob": {"sha256": "0" * 64, "size": -1}},
        {"$blob": {"sha256": "0" * 64, "size": 1, "path": "/etc/passwd"}},
        {"$blob": {"sha256": "0" * 64, "size": 1}, "more": 1},
    ],
)
async def test_invalid_blob_references_are_refused(tmp_path: Path, forged: Any) -> None:  # noqa: ANN401 - any JSON value
    blobs = open_blobs(ServerSettings(data_dir=tmp_path))
    with pytest.raises(NodeError) as raised:
        await NodeBlobs(blobs).get(make_caller(), forged, max_bytes=10)
    assert raised.value.code == "invalid-blob"
    with pytest.raises(InvalidBlobReference):
        BlobReference.from_value(forged)
    await blobs.close()


# ── orphans ───────────────────────────────────────────────────────────────────────────────────────────────


def backdate_blobs(tmp_path: Path, s3: fake_s3.FakeS3, days: float) -> None:
    """Move the creation times of all blobs back by `days`."""
    moment = time.time() - days * 86_400
    for path in (tmp_path / "blobs").glob("*/*"):
        os.utime(path, (moment, moment))
    for stored in s3.objects.values():
        stored.modified_at = datetime.now(UTC) - timedelta(days=days)


async def test_the_age_of_a_content_is_told_by_the_clock_of_its_storage(
    blobs: BlobStore, on_sqlite: MigratedDatabase, s3: fake_s3.FakeS3
) -> None:
    s3.behind = timedelta(days=2)
    async with open_run_database(on_sqlite):
        database = Database(parse_url(on_sqlite.url))
        fresh = BlobOwner("org_1", "exec_fresh")
        content = await put(blobs, fresh, b"just now")
        await orphan_blobs.delete_orphans(blobs, database)
        assert await blobs.get(fresh, content.sha256) == b"just now"
        await database.close()


async def test_blobs_without_a_run_are_deleted_after_a_day(
    blobs: BlobStore, on_sqlite: MigratedDatabase, tmp_path: Path, s3: fake_s3.FakeS3
) -> None:
    async with open_run_database(on_sqlite) as run_database, AsyncExitStack() as stack:
        database = Database(parse_url(on_sqlite.url))
        stack.push_async_callback(database.close)
        place = await run_database.workflow()
        first, resumed = await run_database.accept(place), await run_database.accept(place)
        await run_database.query(
            "UPDATE execution SET resumed_from = :first, key_id = :gone WHERE id = :id",
            first=first.execution_id,
            gone="exec_gone",
            id=resumed.execution_id,
        )
        organization_id = place.organization.id
        kept = [BlobOwner(organization_id, first.execution_id), BlobOwner(organization_id, "exec_gone")]
        orphan = BlobOwner(organization_id, "exec_orphan")
        contents = {owner: await put(blobs, owner, owner.key_id.encode()) for owner in (*kept, orphan)}

        await orphan_blobs.delete_orphans(blobs, database)
        assert await blobs.get(orphan, contents[orphan].sha256), "it may be a run that is only just ending"
        backdate_blobs(tmp_path, s3, days=2)
        await orphan_blobs.delete_orphans(blobs, database)
        for owner in kept:
            assert await blobs.get(owner, contents[owner].sha256)
        with pytest.raises(BlobLost):
            await blobs.get(orphan, contents[orphan].sha256)

        await run_database.query("DELETE FROM execution WHERE id = :id", id=resumed.execution_id)
        assert await orphan_blobs.delete_unused(blobs, database, kept) == 1
        assert await blobs.get(kept[0], contents[kept[0]].sha256)
