"""Blobs over HTTP: outputs refer to them, and callers that may see the run may download them."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import httpx2
import pytest
from sqlalchemy import update
from sqlmodel import col

from engine.run_records import NodeSpan, RunError, RunStatus, SpanStatus
from gateway.http import limits
from journal.blobs.blob_reference import BlobReference
from journal.blobs.blob_storage import BlobOwner
from journal.store import ClaimedRun, ClaimQuery, RunWrite
from models.execution import SpanRow
from tests.integration.gateway_harness import (
    GRAPH,
    GatewayHarness,
    OrganizationUsers,
    UserClient,
    assert_refused,
)

EXECUTIONS = "/api/v1/executions"
LARGE = json.dumps({"text": "x" * 3_000_000}).encode()


class RunWithBlob:
    """Failed run of the owner with one output in a blob."""

    def __init__(
        self, harness: GatewayHarness, person: UserClient, run: ClaimedRun, reference: BlobReference
    ) -> None:
        self.harness = harness
        self.person = person
        self.run = run
        self.reference = reference

    @property
    def path(self) -> str:
        return f"{EXECUTIONS}/{self.run.execution_id}"

    @property
    def owner(self) -> BlobOwner:
        return BlobOwner(self.run.organization_id, self.run.key_id)

    def blob(self, sha: str | None = None) -> str:
        return f"{self.path}/blobs/{sha or self.reference.sha256}"


async def claim_run(harness: GatewayHarness, execution_id: str) -> ClaimedRun:
    while True:
        for one in await harness.gateway.store.claim(ClaimQuery(owner="worker", lease_seconds=60, limit=50)):
            if one.execution_id == execution_id:
                return one


@pytest.fixture
async def run_with_blob(harness: GatewayHarness, people: OrganizationUsers) -> RunWithBlob:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    run = await claim_run(harness, response.json()["executionId"])
    owner = BlobOwner(run.organization_id, run.key_id)
    reference = await harness.gateway.blobs.put(owner, LARGE, media_type="application/json")
    spans = [
        NodeSpan(
            "start",
            "Start",
            "manual",
            SpanStatus.COMPLETED,
            1,
            run.started_at,
            run.started_at,
            port="output",
            output_blob=reference.as_text(),
        ),
        NodeSpan(
            "step", "Step", "set", SpanStatus.FAILED, 2, run.started_at, run.started_at, input_node="start"
        ),
    ]
    write = RunWrite(
        run.execution_id,
        run.shard,
        run.token,
        spans,
        completed_nodes=2,
        end=RunStatus.FAILED,
        error=RunError("node-error", "No", "step", 1),
    )
    assert await harness.gateway.store.record([write]) == {run.execution_id}
    return RunWithBlob(harness, people.owner, run, reference)


async def get_json(run_with_blob: RunWithBlob, path: str) -> Any:  # noqa: ANN401 - any JSON value
    response = await run_with_blob.person.api.get(run_with_blob.path + path)
    assert response.status_code == 200, response.text
    return response.json()


def explanation(
    run_with_blob: RunWithBlob, reason: str = "too-large", path: str | None = None
) -> dict[str, Any]:
    """Return the explanation in place of the output; its message is for people."""
    note = {"bytes": len(LARGE), "reason": reason, "message": ANY, "url": path or run_with_blob.blob()}
    return {**run_with_blob.reference.as_json(), "omitted": note}


async def test_a_large_output_is_explained_wherever_it_would_stand(run_with_blob: RunWithBlob) -> None:
    explained = explanation(run_with_blob)
    assert (await get_json(run_with_blob, ""))["outputs"] == {"start": explained}
    assert (await get_json(run_with_blob, "/progress?wait=0"))["outputs"] == {"start": explained}
    start, step = (await get_json(run_with_blob, "/spans"))["spans"]
    assert start["outputData"] == step["inputData"] == explained
    assert (step["outputData"], start["inputData"]) == (None, None)
    assert (await run_with_blob.person.api.get(start["outputData"]["omitted"]["url"])).content == LARGE
    events = (await run_with_blob.person.api.get(f"{run_with_blob.path}/events")).text
    told = [json.loads(line.removeprefix("data: ")) for line in events.splitlines() if "nodeId" in line]
    assert [span["outputData"] for span in told if span.get("nodeLabel") == "Start"] == [explained]


async def test_large_outputs_are_shown_where_that_is_asked_for(run_with_blob: RunWithBlob) -> None:
    large = json.loads(LARGE)
    assert (await get_json(run_with_blob, "?expand=blobs"))["outputs"] == {"start": large}
    start, step = (await get_json(run_with_blob, "/spans?expand=blobs&limit=50"))["spans"]
    assert start["outputData"] == step["inputData"] == large


async def test_an_answer_shows_large_outputs_up_to_its_limit(
    run_with_blob: RunWithBlob, monkeypatch: pytest.MonkeyPatch
) -> None:
    # One fits; the same one at two places does not.
    monkeypatch.setattr(limits, "EXPANDED_BYTES", len(LARGE) * 2 - 1)
    assert (await get_json(run_with_blob, "?expand=blobs"))["outputs"] == {"start": json.loads(LARGE)}
    start, step = (await get_json(run_with_blob, "/spans?expand=blobs"))["spans"]
    assert start["outputData"] == step["inputData"] == explanation(run_with_blob, "over-limit")


@pytest.mark.parametrize("spoilt", [b"{} , {}", b'{"a": "\xff"}', b"{" + b" " * len(LARGE), None])
async def test_a_content_that_is_none_is_explained_instead(
    run_with_blob: RunWithBlob, spoilt: bytes | None
) -> None:
    """A pod may have stored arbitrary bytes, or a disk may have lost them: the rest of the answer stays
    complete.
    """
    reference = run_with_blob.reference
    if spoilt is not None:
        put = await run_with_blob.harness.gateway.blobs.put(
            run_with_blob.owner, spoilt, media_type="application/json"
        )
        reference = BlobReference(put.sha256, min(put.size, 9), "application/json")
    else:
        reference = BlobReference("0" * 64, 9, "application/json")
    text = reference.as_text().decode()
    statement = update(SpanRow).where(col(SpanRow.node_id) == "start").values(output_blob=text)
    await run_with_blob.harness.gateway.database.transaction(lambda connection: connection.execute(statement))
    (output,) = (await get_json(run_with_blob, "?expand=blobs"))["outputs"].values()
    assert (output["omitted"]["reason"], output["$blob"]["sha256"]) == ("lost", reference.sha256)


@pytest.mark.parametrize("path", ["?expand=blob", "/spans?expand=blobs,outputs", "?expand=BLOBS"])
async def test_a_misspelt_expansion_is_refused_with_those_that_there_are(
    run_with_blob: RunWithBlob, path: str
) -> None:
    response = await run_with_blob.person.api.get(run_with_blob.path + path)
    assert_refused(response, 400, "invalid-query")
    assert "blobs" in response.json()["error"]["details"][0]["message"]


async def test_a_value_that_looks_like_a_reference_is_shown_as_it_is(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**GRAPH)
    response = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    run = await claim_run(harness, response.json()["executionId"])
    file = BlobReference("0" * 64, 1, "text/csv")
    output = NodeSpan(
        "start", "", "manual", SpanStatus.COMPLETED, 1, run.started_at, run.started_at, output=file.as_text()
    )
    write = RunWrite(run.execution_id, run.shard, run.token, [output], end=RunStatus.COMPLETED)
    await harness.gateway.store.record([write])
    for path in ("?expand=blobs", "/progress?wait=0"):
        shown = (await people.owner.api.get(f"{EXECUTIONS}/{run.execution_id}{path}")).json()
        assert shown["outputs"] == {"start": file.as_json()}


async def test_a_content_is_given_out_to_be_saved_and_never_to_be_shown(run_with_blob: RunWithBlob) -> None:
    response = await run_with_blob.person.api.get(run_with_blob.blob())
    assert response.content == LARGE
    headers = response.headers
    assert headers["Content-Type"] == "application/json"
    assert headers["Content-Disposition"] == "attachment"
    assert headers["Content-Length"] == str(len(LARGE))
    assert headers["ETag"] == f'"{run_with_blob.reference.sha256}"'
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"].startswith("sandbox")
    head = await run_with_blob.person.api.head(run_with_blob.blob())
    assert (head.content, head.headers["Content-Length"]) == (b"", str(len(LARGE)))


async def test_files_named_by_others_are_only_files(run_with_blob: RunWithBlob) -> None:
    content = b"<script>alert(1)</script>"
    for number, (media_type, name, content_type, disposition) in enumerate(
        [
            ("text/html", "ü b.html", "text/html", "attachment; filename*=UTF-8''%C3%BC%20b.html"),
            (
                "text/html\r\nX-Evil: 1",
                'a"; x=/../b\r\nX-Evil: 1.html',
                "application/octet-stream",
                "attachment; filename*=UTF-8''bX-Evil%3A%201.html",
            ),
        ]
    ):
        reference = await run_with_blob.harness.gateway.blobs.put(
            run_with_blob.owner, content * (number + 1), media_type=media_type, name=name
        )
        response = await run_with_blob.person.api.get(run_with_blob.blob(reference.sha256))
        assert response.content == content * (number + 1)
        assert response.headers["Content-Type"] == content_type
        assert response.headers["Content-Disposition"] == disposition
        assert "X-Evil" not in response.headers


async def test_missing_objects_are_not_found(run_with_blob: RunWithBlob) -> None:
    for sha in ("0" * 64, "A" * 64, "0" * 63, "%2e%2e%2fx", "0" * 64 + "%0a"):
        assert_refused(await run_with_blob.person.api.get(run_with_blob.blob(sha)), 404, "not-found")


async def test_a_blob_hash_gives_no_access_without_access_to_the_run(
    run_with_blob: RunWithBlob, people: OrganizationUsers
) -> None:
    for person in (people.colleague, people.stranger):
        assert_refused(await person.api.get(run_with_blob.blob()), 404, "not-found")
    workflow_id = await people.stranger.create(**GRAPH)
    response = await people.stranger.api.post(
        f"/api/v1/workflows/{workflow_id}/execute", json={"triggerInputs": run_with_blob.reference.as_json()}
    )
    own = response.json()["executionId"]
    assert_refused(
        await people.stranger.api.get(f"{EXECUTIONS}/{own}/blobs/{run_with_blob.reference.sha256}"),
        404,
        "not-found",
    )


async def test_a_resumed_run_shows_its_origin(run_with_blob: RunWithBlob) -> None:
    response = await run_with_blob.person.api.post(f"{run_with_blob.path}/resume")
    assert response.status_code == 201, response.text
    resumed = f"{EXECUTIONS}/{response.json()['executionId']}"
    (span,) = (await run_with_blob.person.api.get(f"{resumed}/spans")).json()["spans"]
    assert span["outputData"] == explanation(
        run_with_blob, path=f"{resumed}/blobs/{run_with_blob.reference.sha256}"
    )
    content = await run_with_blob.person.api.get(f"{resumed}/blobs/{run_with_blob.reference.sha256}")
    assert sha256(content.content).hexdigest() == run_with_blob.reference.sha256


@pytest.mark.every_database
async def test_a_spoilt_content_never_arrives_whole(run_with_blob: RunWithBlob) -> None:
    folder = (
        Path(run_with_blob.harness.gateway.settings.data_dir) / "blobs" / run_with_blob.owner.organization_id
    )
    file = folder / run_with_blob.owner.key_id / run_with_blob.reference.sha256
    content = file.read_bytes()
    file.write_bytes(content[:-1] + b"!")
    with pytest.raises(Exception, match="does not match its SHA-256"):
        await run_with_blob.person.api.get(run_with_blob.blob())


async def test_a_storage_that_is_away_is_not_ready(run_with_blob: RunWithBlob) -> None:
    folder = Path(run_with_blob.harness.gateway.settings.data_dir) / "blobs"
    folder.rename(folder.with_name("elsewhere"))
    folder.write_text("in the way")
    try:
        response: httpx2.Response = await run_with_blob.person.api.get(run_with_blob.blob())
        assert_refused(response, 503, "not-ready")
    finally:
        folder.unlink()
        folder.with_name("elsewhere").rename(folder)
