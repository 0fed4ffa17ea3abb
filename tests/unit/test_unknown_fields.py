"""Fields that a body doesn't have: refused with the name that was meant, wherever a body says who may do what."""

import re

import msgspec
import pytest

from gateway import routes
from gateway.errors import ApiError
from gateway.http.wire import GuardedWire, StrictWire, Wire, convert

CONTROLS_ACCESS = re.compile(r"/(visibility|share|status|lifecycle(/preview)?|trigger-token)$|^/api/v1/auth/")
BODIES = [
    pytest.param(line.body, id=f"{line.method} {line.path}")
    for line in routes.TABLE
    if line.body is not None and CONTROLS_ACCESS.search(line.path)
]


class Inner(GuardedWire):
    """A part with fields of its own."""

    start_time: str = ""


class Outer(Wire):
    """A body that passes over what it doesn't know, with parts that don't."""

    parts: list[Inner] = msgspec.field(default_factory=list)
    by_name: dict[str, Inner] = msgspec.field(default_factory=dict)
    number: int = 0


class Closed(StrictWire):
    """A body that knows all of its fields."""

    is_public: bool | None = None
    number: int = 0


def problems(value: object, kind: type[msgspec.Struct]) -> dict[str, tuple[str, str]]:
    """Return code and message of everything that is refused, by path."""
    with pytest.raises(ApiError) as refused:
        convert(value, kind)  # type: ignore[arg-type]  # any JSON
    assert (refused.value.status, refused.value.code) == (422, "validation-failed")
    return {str(one["path"]): (str(one["code"]), str(one["message"])) for one in refused.value.details}


@pytest.mark.parametrize("body", BODIES)
def test_a_body_that_controls_access_refuses_each_misspelt_field(body: type[msgspec.Struct]) -> None:
    for field in msgspec.structs.fields(body):
        misspelt = f"{field.encode_name}s"
        code, message = problems({misspelt: True}, body)[misspelt]
        assert code == "unknown-field"
        assert field.encode_name in message


def test_every_part_of_the_access_to_an_organization_is_looked_at() -> None:
    assert len(BODIES) == 11


@pytest.mark.parametrize("name", ["is_public", "public", "isPublik", "IsPublic", "ispublic"])
def test_the_name_that_was_meant_is_told(name: str) -> None:
    assert problems({name: True}, Closed) == {
        name: ("unknown-field", f"{name} is no field here: did you mean isPublic?")
    }


def test_all_that_is_wrong_is_told_at_once_and_a_long_name_is_cut() -> None:
    found = problems({"x" * 10_000: 1, "isPublik": 1, "number": "one"}, Closed)
    assert found.pop("number")[0] == "invalid-type"
    assert found.pop("isPublik")[0] == "unknown-field"
    ((path, (code, message)),) = found.items()
    assert (path, code) == ("x" * 64, "unknown-field")
    assert "there is isPublic, number" in message


def test_parts_are_looked_at_wherever_they_stand() -> None:
    value = {"parts": [{}, {"starttime": ""}], "byName": {"a": {"start_time": ""}}, "numbr": 1, "number": 1.0}
    assert set(problems(value, Outer)) == {"parts.1.starttime", "byName.a.start_time"}
    assert convert({"parts": [{"color": "red"}], "numbr": 1}, Outer).number == 0


def test_many_unknown_fields_make_no_long_answer() -> None:
    assert len(problems({f"field{number}": 1 for number in range(5_000)}, Closed)) == 100
