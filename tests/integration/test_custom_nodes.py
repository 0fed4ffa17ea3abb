"""Custom node types: versions that never change, their place in catalog, validation and definitions."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import jsonschema_rs
import pytest
from pilotflame_sdk.node_definitions import define_node
from sqlalchemy import select
from sqlmodel import col

from json_text import decoding
from models.access import KeyScope
from models.execution import Execution
from models.workflow import Definition
from tests.custom_types import RESIZE, custom_graph, custom_type
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient, assert_refused

pytestmark = pytest.mark.timeout(60)
NODES = "/api/v1/workflow-nodes"
READ_ONLY = {"resources", "s3Location", "runnable", "isTrigger", "defaults", "evaluated"}


async def add_type(person: UserClient, **changes: Any) -> dict[str, Any]:  # noqa: ANN401 - any JSON value
    answer = await person.api.post(NODES, json=custom_type(**changes))
    assert answer.status_code == 201, answer.text
    shown: dict[str, Any] = answer.json()
    return shown


async def validate(person: UserClient, workflow_id: str) -> dict[str, Any]:
    answer = await person.api.post(f"/api/v1/workflows/{workflow_id}/validate")
    shown: dict[str, Any] = answer.json()
    return shown


async def test_a_version_never_changes_and_its_answer_can_be_sent_again(people: OrganizationUsers) -> None:
    api = people.owner.api
    shown = await add_type(people.owner)
    assert shown["effect"] == {"default": "write"}
    assert shown["defaults"] == {"width": 1200}
    assert shown["task"]["retry"] == {
        "maxAttempts": 3,
        "backoff": "exponential",
        "delay": 1,
        "maxDelay": 60,
    }

    again = await api.post(NODES, json=shown)
    assert (again.status_code, again.json()) == (200, shown)
    same = await asyncio.gather(*(api.post(NODES, json=custom_type(version="1.3.0")) for _ in range(5)))
    assert sorted(one.status_code for one in same) == [200, 200, 200, 200, 201]
    assert_refused(await api.post(NODES, json=custom_type(description="Another.")), 409, "version-exists")

    await add_type(people.owner, version="1.10.0", description="Newest.")
    await add_type(people.owner, version="1.9.0")
    found = (await api.get(f"{NODES}/acme/resize")).json()
    assert (found["version"], found["description"]) == ("1.10.0", "Newest.")
    older = (await api.get(f"{NODES}/acme/resize/schema?version=1.2.0")).json()
    assert older["hash"] == shown["hash"]
    versions = (await api.get(f"{NODES}/acme/resize/versions")).json()
    assert [one["version"] for one in versions["versions"]] == ["1.10.0", "1.9.0", "1.3.0", "1.2.0"]

    # Deprecation hides a version, and may change.
    for version in ("1.10.0", "1.9.0", "1.3.0", "1.2.0"):
        one = (await api.get(f"{NODES}/acme/resize?version={version}")).json()
        assert (await api.post(NODES, json={**one, "deprecated": True})).json()["deprecated"] is True
    assert (await api.get(f"{NODES}?search=resize")).json()["count"] == 0
    assert (await api.get(f"{NODES}?search=resize&deprecated=true")).json()["count"] == 1
    oldest = (await api.get(f"{NODES}/acme/resize?version=1.2.0")).json()
    await api.post(NODES, json={**oldest, "deprecated": False})
    listed = (await api.get(f"{NODES}?search=resize")).json()["nodes"]
    assert [one["version"] for one in listed] == ["1.2.0"]


async def test_documents_are_checked(people: OrganizationUsers) -> None:
    async def refused(**changes: Any) -> str:  # noqa: ANN401 - any JSON value
        answer = await people.owner.api.post(NODES, json=custom_type(**changes))
        assert answer.status_code == 422, answer.text
        return " ".join(one["message"] for one in answer.json()["error"]["details"])

    assert "a namespace of 2 to 39 characters and a name" in await refused(type="resize")
    assert "reserved" in await refused(type="pilotflame/resize")
    assert "reserved" in await refused(type="acme/schema")
    assert "three numbers" in await refused(version="1.2")
    assert "did you mean effect?" in await refused(efect="read")
    assert "no references outside" in await refused(config={"properties": {"a": {"$ref": "http://x/y"}}})
    assert "contains itself" in await refused(
        config={
            "properties": {"a": {"$ref": "#/$defs/a"}},
            "$defs": {"a": {"properties": {"b": {"$ref": "#/$defs/a"}}}},
        }
    )
    assert "not supported" in await refused(config={"patternProperties": {"a": {}}})
    assert "no usable JSON Schema" in await refused(config={"properties": {"a": {"pattern": "(a)\\1"}}})
    assert "larger than" in await refused(config={"properties": {"a": {"description": "x" * 70_000}}})
    assert "config.type" in await refused(config={"type": "string"})
    assert "the port error" in await refused(ports={"outputs": ["output", "error"]})
    assert "exponential or fixed" in await refused(task={"retry": {"backoff": "often"}})
    assert "task.concurrency.key" in await refused(task={"concurrency": {"limit": 1, "key": "{{ nothing }}"}})
    assert "no property" in await refused(effect={"default": "read", "field": "metod", "cases": {}})
    # Exponential references cost nothing.
    doubled = {f"d{n}": {"anyOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(30)}
    bomb = {"properties": {"a": {"$ref": "#/$defs/d0"}}, "$defs": {**doubled, "d30": {"type": "string"}}}
    assert "too large or too deep" in await refused(config=bomb)


async def test_references_are_written_out(people: OrganizationUsers) -> None:
    config = {
        "type": "object",
        "properties": {"size": {"$ref": "#/$defs/Size", "description": "The size."}},
        "$defs": {"Size": {"type": "object", "properties": {"width": {"type": "integer"}}}},
    }
    shown = await add_type(people.owner, config=config)
    size = {"type": "object", "properties": {"width": {"type": "integer"}}, "description": "The size."}
    assert shown["config"]["properties"] == {"size": size}
    again = await people.owner.api.post(NODES, json=custom_type(config=config))
    assert again.status_code == 200


async def test_a_name_of_one_letter_is_told_the_rule(people: OrganizationUsers) -> None:
    rule = r"of 2 to 39 .* of 2 to 63, .* lower-case letters, digits and hyphens, a letter first"
    for type_name in ("acme/x", "a/resize"):
        refused = await people.owner.api.post(NODES, json=custom_type(type=type_name))
        assert_refused(refused, 422, "validation-failed")
        assert re.search(rule, refused.json()["error"]["details"][0]["message"])
        with pytest.raises(ValueError, match=rule):
            define_node(print, type_name, "1.0.0", is_process=False, fields={}, task_rules={})


async def test_custom_types_are_seen_by_their_organization_alone(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    shown = await add_type(people.owner)
    assert (await people.colleague.api.get(f"{NODES}/acme/resize")).status_code == 200
    for path in ("", "/schema", "/versions"):
        assert_refused(await people.stranger.api.get(f"{NODES}/acme/resize{path}"), 404, "not-found")
    assert_refused(await people.stranger.api.delete(f"{NODES}/acme/resize?all=true"), 404, "not-found")
    assert (await people.stranger.api.get(f"{NODES}?type=acme/resize")).json()["count"] == 0
    refused = await people.stranger.api.post("/api/v1/workflows", json={"name": "x", **custom_graph()})
    assert_refused(refused, 422, "validation-failed")
    assert "acme/resize" not in refused.json()["error"]["details"][0]["message"].partition("did you")[2]

    # Another organization may have another type of the same name and version.
    theirs = await add_type(people.stranger, description="Theirs.")
    assert (await people.stranger.api.post(NODES, json={**theirs, "deprecated": True})).is_success
    for person, expected, is_deprecated in ((people.owner, shown, False), (people.stranger, theirs, True)):
        found = (await person.api.get(f"{NODES}/acme/resize")).json()
        assert (found["hash"], found["deprecated"]) == (expected["hash"], is_deprecated)

    organization = await harness.organization()
    worker = await harness.person(organization, scopes={KeyScope.TASKS_WORK, KeyScope.WORKFLOWS_READ})
    assert_refused(await worker.api.post(NODES, json=RESIZE), 403, "scope-required")


async def test_validation_reads_the_document(people: OrganizationUsers) -> None:
    await add_type(people.owner)
    await add_type(people.owner, version="1.3.0")
    workflow_id = await people.owner.create(**custom_graph({"image": 7, "widht": 3}))
    shown = await people.owner.workflow(workflow_id)
    work = next(node for node in shown["nodes"] if node["id"] == "work")
    assert (work["version"], work["label"]) == ("1.3.0", "Resize image")
    found = await validate(people.owner, workflow_id)
    messages = " ".join(one["message"] for one in [*found["errors"], *found["warnings"]])
    assert "image: must be a text, not" in messages
    assert "did you mean width?" in messages
    config = {"image": "{{ data.file }}", "width": "{{ data.width }}"}
    changed = await people.owner.api.put(f"/api/v1/workflows/{workflow_id}", json=custom_graph(config))
    assert changed.status_code == 200, changed.text
    assert (await validate(people.owner, workflow_id))["errors"] == []
    # Also inside of alternatives, such as those of an optional class.
    size = {"type": "object", "properties": {"width": {"type": "integer"}}}
    schema = {"type": "object", "properties": {"size": {"anyOf": [size, {"type": "null"}]}}}
    await add_type(people.owner, type="acme/crop", config=schema)
    for width, count in (("{{ data.width }}", 0), ("wide", 1)):
        graph = custom_graph({"size": {"width": width}}, type_name="acme/crop")
        changed = await people.owner.api.put(f"/api/v1/workflows/{workflow_id}", json=graph)
        assert changed.status_code == 200, changed.text
        assert len((await validate(people.owner, workflow_id))["errors"]) == count

    # An expression in `oneOf` may fit several schemas before it is rendered; other values fit exactly one.
    by_name = {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}}
    by_size = {"type": "object", "required": ["width"], "properties": {"width": {"type": "integer"}}}
    schema = {"type": "object", "properties": {"size": {"oneOf": [by_name, by_size]}}}
    await add_type(people.owner, type="acme/fit", config=schema)
    for given, count in (
        ({"width": "{{ data.width }}"}, 0),
        ({"width": "{{ data.width }}", "name": "{{ data.name }}"}, 0),
        ({"width": ["{{ data.width }}"]}, 1),
        ({"width": 3}, 0),
        ({"width": "wide"}, 1),
        ({"width": 3, "name": "A4"}, 1),
    ):
        graph = custom_graph({"size": given}, type_name="acme/fit")
        changed = await people.owner.api.put(f"/api/v1/workflows/{workflow_id}", json=graph)
        assert changed.status_code == 200, changed.text
        assert len((await validate(people.owner, workflow_id))["errors"]) == count, given

    # A wrong port and a misspelled type have fixes, also where the type was added after the workflow.
    wrong = custom_graph(type_name="acme/resise")
    assert "did you mean acme/resize?" in str(
        (await people.owner.api.post("/api/v1/workflows", json={"name": "x", **wrong})).json()
    )
    later = custom_graph()
    later["nodes"].append({"id": "end", "nodeId": "log", "config": {"message": "x"}})
    later["connections"].append({"source": "work", "sourcePort": "to-small", "target": "end"})
    workflow_id = await people.owner.create(**later)
    error = (await validate(people.owner, workflow_id))["errors"][0]
    assert (error["type"], error["fix"]["value"]) == ("invalid-port", "too-small")


async def test_scopes_mappings_and_references_are_those_of_the_document(people: OrganizationUsers) -> None:
    api = people.owner.api
    source = {"type": "string", "x-resource": "datasources:read", "x-constant": True}
    properties = {**RESIZE["config"]["properties"], "bucket": source}
    output = {"schema": {**RESIZE["output"]["schema"], "additionalProperties": False}}
    await add_type(people.owner, config={**RESIZE["config"], "properties": properties}, output=output)
    body = {"name": "Bucket", "type": "http-bearer", "secrets": {"token": "t"}}
    bucket = (await api.post("/api/v1/datasources", json=body)).json()["dataSourceId"]
    graph = custom_graph({"image": "a.png", "bucket": bucket})
    graph["nodes"].append({"id": "end", "nodeId": "log", "config": {"message": "{{ data.urll }}"}})
    graph["connections"].append({"source": "work", "target": "end"})
    workflow_id = await people.owner.create(**graph)

    scopes = (await api.post(f"/api/v1/workflows/{workflow_id}/compute-scopes")).json()["scopes"]
    assert scopes == [f"datasources:read:{bucket}"]
    (warning,) = [
        one
        for one in (await validate(people.owner, workflow_id))["warnings"]
        if one["type"] == "unresolved-mapping"
    ]
    assert "url" in warning["message"]
    assert "data.url }}" in str(warning["fix"])
    exported = (await api.get(f"/api/v1/workflows/{workflow_id}/export")).json()
    assert [one["id"] for one in exported["references"]] == [bucket]
    planned = await api.post("/api/v1/workflows/import", json={"document": exported})
    assert [one["id"] for one in planned.json()["references"]] == [bucket]
    document = {"document": exported, "references": {bucket: None}}
    imported = await api.post("/api/v1/workflows/import", json=document)
    assert imported.status_code == 201, imported.text
    nodes = (await people.owner.workflow(imported.json()["workflowId"]))["nodes"]
    assert [one["config"] for one in nodes if one["type"] == "acme/resize"] == [{"image": "a.png"}]


async def test_the_openapi_document_of_an_organization_has_its_types(people: OrganizationUsers) -> None:
    async def schemas(person: UserClient) -> dict[str, Any]:
        answer = await person.api.get("/api/v1/openapi.json")
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()["components"]["schemas"]
        return found

    before = await schemas(people.owner)
    shared = (await people.owner.api.get("/openapi.json")).json()["components"]["schemas"]
    assert all(before[name] == schema for name, schema in shared.items()), "no component is overwritten"
    await add_type(people.owner)
    await add_type(people.owner, type="acme/hidden", deprecated=True)
    after = await schemas(people.owner)
    assert {*after} - {*before} == {"node.acme.resize", "config.acme.resize", "output.acme.resize"}
    assert await schemas(people.stranger) == before

    # Custom types look like those of the server, and validate nodes.
    assert {*after["node.acme.resize"]} == {*after["node.http-request"]}
    assert after["node"]["discriminator"]["mapping"]["acme/resize"].endswith("/node.acme.resize")
    assert after["config.acme.resize"]["properties"]["width"]["default"] == 1200
    checker = jsonschema_rs.Draft202012Validator(
        {"$ref": "#/components/schemas/node", "components": {"schemas": after}}
    )
    assert checker.is_valid({"id": "a", "type": "acme/resize", "config": {"image": "a.png"}})
    assert not checker.is_valid({"id": "a", "type": "acme/resize", "config": {"width": 3}})
    condition = {"not": {"left": 1, "operator": "is-true"}}
    assert checker.is_valid({"id": "a", "type": "conditional", "config": {"condition": condition}})
    condition = {"not": {"left": 1, "operator": "is-treu"}}
    assert not checker.is_valid({"id": "a", "type": "conditional", "config": {"condition": condition}})


async def test_a_type_is_deleted_only_while_no_workflow_has_it(people: OrganizationUsers) -> None:
    api = people.owner.api
    await add_type(people.owner)
    await add_type(people.owner, version="1.3.0")
    workflow_id = await people.owner.create(**custom_graph(version="1.2.0"))
    refused = await api.delete(f"{NODES}/acme/resize?version=1.2.0")
    assert_refused(refused, 409, "node-type-in-use")
    assert [one["path"] for one in refused.json()["error"]["details"]] == [f"workflows.{workflow_id}"]
    assert_refused(await api.delete(f"{NODES}/acme/resize?all=true"), 409, "node-type-in-use")
    hidden = await people.colleague.api.delete(f"{NODES}/acme/resize?all=true")
    assert hidden.json()["error"]["details"] == []
    assert (await api.delete(f"{NODES}/acme/resize?version=1.3.0")).status_code == 204
    assert_refused(await api.delete(f"{NODES}/acme/resize?version=1.3.0"), 404, "not-found")
    assert (await api.delete(f"/api/v1/workflows/{workflow_id}")).status_code == 204
    for query in ("", "?all=false", "?version=1.2.0&all=true"):
        assert_refused(await api.delete(f"{NODES}/acme/resize{query}"), 400, "invalid-query")
    assert (await api.delete(f"{NODES}/acme/resize?all=true")).status_code == 204
    audit = await people.admin.api.get("/api/v1/audit?objectId=acme/resize@1.2.0")
    assert [one["action"] for one in audit.json()["entries"]] == ["node-type.deleted", "node-type.added"]


async def test_a_run_pins_the_content_of_its_types(
    harness: GatewayHarness, people: OrganizationUsers
) -> None:
    workflow_id = await people.owner.create(**{**custom_graph(), "nodes": custom_graph()["nodes"][:1]})
    await add_type(people.owner)
    changed = await people.owner.api.put(f"/api/v1/workflows/{workflow_id}", json=custom_graph())
    assert changed.status_code == 200, changed.text
    answer = await people.owner.api.post(f"/api/v1/workflows/{workflow_id}/execute", json={})
    assert answer.status_code == 201, answer.text
    statement = (
        select(col(Definition.body))
        .join(Execution, col(Execution.definition_hash) == col(Definition.hash))
        .where(col(Execution.id) == answer.json()["executionId"])
    )
    async with harness.gateway.database.read() as connection:
        body = await connection.scalar(statement)
    pinned = decoding.decode(body or "{}")["nodeTypes"]["acme/resize"]["1.2.0"]
    assert pinned["ports"]["outputs"] == ["output", "too-small"]
    exported = await people.owner.api.get(f"/api/v1/workflows/{workflow_id}/export")
    assert exported.json()["nodes"][1]["version"] == "1.2.0"
