"""Unknown fields of any body: refused with the name that was probably meant."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from engine.values import Json
from gateway import routes
from gateway.ai_models.ai_settings import UpdateAiSettings
from gateway.http.errors import ApiError
from gateway.http.wire import GuardedWire, StrictWire, WireStruct, convert
from gateway.ingest.email_trigger import ParsedMailRequest
from gateway.workflows.graph_shapes import ConnectionInput, NodeInput
from gateway.workflows.workflow_shapes import UpdateWorkflow
from tests.each_case import check_each

CONTRACT = json.loads((Path(__file__).parents[1] / "contract" / "endpoints.json").read_text())["endpoints"]
INSIDE = {(one["method"], re.sub(r":(\w+)", r"{\1}", one["path"])) for one in CONTRACT}
"""Method and path of each endpoint of the contract."""
OF_SENDERS = {("POST", "/mail/{id}")}
"""Bodies that mail services define."""
LINES = [line for line in routes.TABLE if line.body is not None]
BODIES = [(f"{line.method} {line.path}", line.body) for line in LINES if line.body is not None]


def iterate_structs(kind: Any) -> Iterator[type[msgspec.Struct]]:  # noqa: ANN401 - any type annotation
    """Return every body type inside a type."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
        for field in msgspec.structs.fields(kind):
            yield from iterate_structs(field.type)
    for part in get_args(kind):
        yield from iterate_structs(part)


def iterate_patterns(kind: Any) -> Iterator[msgspec.Meta]:  # noqa: ANN401 - any type annotation
    """Return the constraints with a pattern of the fields inside a type, without those of other body types in it."""
    if isinstance(kind, msgspec.Meta) and kind.pattern is not None:
        yield kind
    for part in get_args(kind):
        yield from iterate_patterns(part)


class InnerBody(GuardedWire):
    """A part with fields of its own."""

    start_time: str = ""


class LenientOuterBody(WireStruct):
    """Lenient body with strict parts."""

    parts: list[InnerBody] = msgspec.field(default_factory=list)
    by_name: dict[str, InnerBody] = msgspec.field(default_factory=dict)
    number: int = 0


class StrictBody(StrictWire):
    """A body that knows all of its fields."""

    is_public: bool | None = None
    number: int = 0


def decode_problems(value: Json, kind: type[msgspec.Struct]) -> dict[str, tuple[str, str]]:
    """Return code and message of everything that is refused, by path."""
    with pytest.raises(ApiError) as refused:
        convert(value, kind)
    assert (refused.value.status, refused.value.code) == (422, "validation-failed")
    return {str(one["path"]): (str(one["code"]), str(one["message"])) for one in refused.value.details}


@check_each(BODIES)
def test_every_body_refuses_each_misspelt_field(body: type[msgspec.Struct]) -> None:
    for field in msgspec.structs.fields(body):
        misspelt = f"{field.encode_name}s"
        code, message = decode_problems({misspelt: True}, body)[misspelt]
        assert code == "unknown-field"
        assert field.encode_name in message


@check_each(BODIES)
def test_no_part_of_a_body_ignores_unknown_fields(body: type[msgspec.Struct]) -> None:
    for part in iterate_structs(body):
        assert part.__struct_config__.forbid_unknown_fields or issubclass(part, GuardedWire), part


@check_each(BODIES)
def test_the_refusal_of_a_text_describes_the_expected_one(body: type[msgspec.Struct]) -> None:
    fields = [field for part in iterate_structs(body) for field in msgspec.structs.fields(part)]
    assert not [field.name for field in fields for one in iterate_patterns(field.type) if not one.description]


def test_an_amount_of_dollars_is_described_where_it_is_refused() -> None:
    said = "monthBudget.maxCost: Expected US dollars as a decimal text such as 250 or 0.5"
    assert decode_problems({"monthBudget": {"maxCost": "5 USD"}}, UpdateAiSettings) == {
        "monthBudget.maxCost": ("invalid-value", said)
    }


def test_bodies_outside_of_the_contract_refuse_every_unknown_field() -> None:
    strict = {
        (line.method, line.path)
        for line in LINES
        for part in iterate_structs(line.body)
        if part is line.body and part.__struct_config__.forbid_unknown_fields
    }
    assert strict == {(line.method, line.path) for line in LINES} - INSIDE - OF_SENDERS


@pytest.mark.parametrize("name", ["is_public", "public", "isPublik", "IsPublic", "ispublic"])
def test_the_name_that_was_meant_is_told(name: str) -> None:
    assert decode_problems({name: True}, StrictBody) == {
        name: ("unknown-field", f"{name} is not a field here: did you mean isPublic?")
    }


def test_all_that_is_wrong_is_told_at_once_and_a_long_name_is_cut() -> None:
    found = decode_problems({"x" * 10_000: 1, "isPublik": 1, "number": "one"}, StrictBody)
    assert found.pop("number")[0] == "invalid-type"
    assert found.pop("isPublik")[0] == "unknown-field"
    ((path, (code, message)),) = found.items()
    assert (path, code) == ("x" * 64, "unknown-field")
    assert "there is isPublic, number" in message


def test_parts_are_looked_at_wherever_they_stand() -> None:
    value: Json = {
        "parts": [{}, {"starttime": ""}],
        "byName": {"a": {"start_time": ""}},
        "numbr": 1,
        "number": 1.0,
    }
    assert set(decode_problems(value, LenientOuterBody)) == {"parts.1.starttime", "byName.a.start_time"}
    assert convert({"parts": [{"color": "red"}], "numbr": 1}, LenientOuterBody).number == 0


def test_many_unknown_fields_make_no_long_answer() -> None:
    assert len(decode_problems({f"field{number}": 1 for number in range(5_000)}, StrictBody)) == 100


def test_other_unknown_fields_of_an_open_body_are_warned_of_once_each() -> None:
    warnings: list[dict[str, Json]] = []
    value: list[Json] = [{"color": "red"}, {"color": "blue", "shape": 1}]
    convert({"parts": value}, LenientOuterBody, warnings=warnings)
    assert [one["path"] for one in warnings] == ["parts.0.color", "parts.1.shape"]
    assert (
        len(decode_problems({"parts": [{f"q{number}": 1} for number in range(5_000)]}, LenientOuterBody))
        == 100
    )


def test_every_part_of_a_strict_body_is_strict() -> None:
    class StrictOuterBody(StrictWire):
        """Strict body of a route, with a part that routes of the contract share."""

        part: InnerBody | None = None

    assert set(decode_problems({"part": {"color": "red"}}, StrictOuterBody)) == {"part.color"}


@pytest.mark.parametrize(
    ("kind", "others"),
    [
        (
            NodeInput,
            "selected dragging width height positionAbsolute sourcePosition targetPosition parentNode zIndex style",
        ),
        (ConnectionInput, "sourceHandle targetHandle animated markerEnd style selected"),
        (ParsedMailRequest, "bcc headers date sender message_id"),
    ],
)
def test_fields_that_canvases_and_mailers_have_besides_are_no_near_misses(
    kind: type[msgspec.Struct], others: str
) -> None:
    warnings: list[dict[str, Json]] = []
    convert(dict.fromkeys(others.split()), kind, warnings=warnings)
    assert [one["path"] for one in warnings] == others.split()


def test_a_misspelt_read_only_field_is_refused() -> None:
    code, message = decode_problems({"isPublik": True}, UpdateWorkflow)["isPublik"]
    assert code == "unknown-field"
    assert "isPublic" in message
