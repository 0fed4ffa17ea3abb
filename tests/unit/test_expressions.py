from __future__ import annotations

import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.expressions import (
    MAX_WRITTEN,
    MISSING,
    ExpressionError,
    ExpressionScope,
    compile_path,
    compile_template,
    compile_value,
)
from engine.values import Json, decode_json

SCOPE: ExpressionScope = {
    "data": {
        "user": {"id": 7, "name": "Ada", "vip": True, "note": None},
        "rows": [{"name": "first"}, {"name": "last"}],
        "odd key": {'"': "quote", "]": "bracket", "}}": "braces", "\\": "backslash"},
        "0": "a key, no position",
        "attack": "{{ trigger.secret }}",
        "ratio": 1.5,
    },
    "trigger": {"secret": "s3cret"},
    "nodes": {"node-1": {"total": 3}},
    "item": "x",
    "index": 0,
}


braceless = st.text(st.characters(exclude_characters="{"))


def render_value(value: Json, scope: ExpressionScope = SCOPE) -> Json:
    unresolved: list[str] = []
    result = compile_value(value).render(scope, unresolved)
    assert unresolved == []
    return result


def refusal_of(value: Json) -> str:
    with pytest.raises(ExpressionError) as caught:
        compile_value(value)
    return str(caught.value)


def make_operation(name: str, *arguments: Json) -> dict[str, Json]:
    return {"$op": name, "args": list(arguments)}


# ── paths ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("data.user.id", 7),
        ("$.data.user.id", 7),
        ("  data.user.name ", "Ada"),
        ("data.user.note", None),
        ('data["user"]["id"]', 7),
        ("data['odd key'][\"]\"]", "bracket"),
        (r'data["odd key"]["\""]', "quote"),
        (r"data['odd key']['\\']", "backslash"),
        ("data.rows[0].name", "first"),
        ("data.rows[-1].name", "last"),
        ("data.rows.0.name", "first"),
        ("data.0", "a key, no position"),
        ("nodes.node-1.total", 3),
        ("item", "x"),
        ("index", 0),
    ],
)
def test_a_path_leads_to_a_value(text: str, found: Json) -> None:
    assert compile_path(text).resolve(SCOPE) == found


@pytest.mark.parametrize(
    "text",
    [
        "data.nobody",
        "data.nobody.id",
        "data.user.id.digits",
        "data.rows[2]",
        "data.rows[-3]",
        "data.rows.2",
        "data.rows.length",
        "data.rows['0']",
        "data.user[0]",
        "data.user.name[0]",
        "data.user.__class__",
        "data.user.keys",
        "data.ratio.real",
        "execution.id",
    ],
)
def test_a_path_that_leads_nowhere_finds_nothing(text: str) -> None:
    assert compile_path(text).resolve(SCOPE) is MISSING


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no path"),
        ("name", "did you mean data.name?"),
        ("$.name", "did you mean data.name?"),
        ("0.data", "begins with"),
        ("data.", "can't be parsed"),
        ("data..user", "can't be parsed"),
        ("data.user()", r"'\(\)'"),
        ("data.user + 1", r"' \+ 1'"),
        ("data[user]", "can't be parsed"),
        ("data['it's']", "can't be parsed"),
        ('data["open]', "can't be parsed"),
        ("data[1.5]", "can't be parsed"),
        ("data[9999999999]", "can't be parsed"),
        ("data.größe", "can't be parsed"),
        ("data.a\nb", "can't be parsed"),
        ("data" + ".a" * 50, "at most 50 steps"),
        ("data." + "a" * 1_000, "at most 1,000 characters"),
    ],
)
def test_invalid_paths_are_refused_with_a_reason(text: str, reason: str) -> None:
    with pytest.raises(ExpressionError, match=reason) as caught:
        compile_path(text)
    assert caught.value.expression in text


# ── templates ───────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | braceless,
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    )
)
def test_a_template_without_braces_renders_to_itself(value: Json) -> None:
    template = compile_template(value)
    assert template.is_static
    assert template.render({}, []) is value


@given(braceless, braceless)
def test_text_around_an_expression_stays_as_it_is(before: str, after: str) -> None:
    data = "{{ item }} and {{ broken"
    template = compile_template(f"{before}{{{{ data }}}}{after}!")
    assert template.render({"data": data}, []) == f"{before}{data}{after}!"


@pytest.mark.parametrize("text", ["{{data.user}}", "{{ data.user }}", " \n{{ data.user }}\t"])
def test_one_whole_expression_keeps_the_type_of_its_value(text: str) -> None:
    assert render_value(text) is SCOPE["data"]["user"]  # type: ignore[index,call-overload]


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("Hello {{ data.user.name }}!", "Hello Ada!"),
        ("{{data.user.id}}{{data.user.id}}", "77"),
        ("{{ data.user.id }} {{ data.user.vip }}", "7 true"),
        ("[{{ data.user.note }}]", "[]"),
        ("x{{ data.ratio }}", "x1.5"),
        ("rows: {{ data.rows }}", 'rows: [{"name":"first"},{"name":"last"}]'),
        ('{"id":{{data.user.id}}}', '{"id":7}'),
        ("{{ data['odd key']['}}'] }} }}", "braces }}"),
        ("it's {{ item }}, isn't it?", "it's x, isn't it?"),
    ],
)
def test_expressions_in_a_text_are_joined_with_it(text: str, result: str) -> None:
    assert render_value(text) == result


def test_expressions_are_found_wherever_a_text_is_but_not_in_keys() -> None:
    value: Json = {"{{ item }}": [{"deep": "{{ item }}"}, 1], "static": {"a": [1]}}
    assert render_value(value) == {"{{ item }}": [{"deep": "x"}, 1], "static": {"a": [1]}}


def test_static_parts_are_shared_and_the_template_stays_as_it_was() -> None:
    static: Json = {"a": [1]}
    template = compile_template({"static": static, "list": ["{{ item }}", static]})
    result: Any = template.render(SCOPE, [])
    assert result["static"] is static
    assert result["list"][1] is static
    assert template.render({"item": "y"}, []) == {"static": static, "list": ["y", static]}


def test_data_is_never_evaluated() -> None:
    assert render_value("{{ data.attack }}") == "{{ trigger.secret }}"
    assert render_value("> {{ data.attack }}") == "> {{ trigger.secret }}"
    assert (
        render_value(make_operation("from-json", make_operation("to-json", "{{ data.attack }}")))
        == "{{ trigger.secret }}"
    )
    data: Json = {"$op": "add", "args": [1, 1]}
    assert render_value({"x": "{{ data }}"}, {"data": data}) == {"x": data}


def test_each_path_that_found_nothing_is_listed_and_is_null() -> None:
    unresolved: list[str] = []
    template = compile_template(
        {"a": "{{ data.a }}", "b": "-{{ $.data.b }}{{ nodes.gone.x }}-", "c": "{{ data.user.note }}"}
    )
    assert template.render(SCOPE, unresolved) == {"a": None, "b": "--", "c": None}
    assert unresolved == ["data.a", "$.data.b", "nodes.gone.x"]


def test_a_template_names_its_paths() -> None:
    template = compile_value(["{{ data.a }} {{ item }}", {"b": make_operation("first", "{{ data.c }}")}])
    assert [path.text for path in template.paths] == ["data.a", "item", "data.c"]


@pytest.mark.parametrize(
    "text",
    [
        "{{",
        "{{ }}",
        "{{ data.a",
        "{{ data.a }",
        "{{ 'data }}",
        "{{{ data }}}",
        "{{ {{ data }} }}",
        "a {{ b.c }}",
    ],
)
def test_braces_without_a_path_are_refused(text: str) -> None:
    assert refusal_of(text)


def test_a_template_is_as_deep_as_json_may_be() -> None:
    value: Json = "{{ item }}"
    for _ in range(64):
        value = [value]
    assert not compile_template(value).is_static
    assert "64 deep" in refusal_of([value])
    nested: Json = "{{ index }}"
    for _ in range(32):
        nested = make_operation("add", nested, 1)
    assert render_value(nested) == 32
    assert "64 deep" in refusal_of(make_operation("add", nested, 1))


def test_the_size_of_a_rendering_is_bounded() -> None:
    scope: ExpressionScope = {"data": "x" * (MAX_WRITTEN // 4)}
    assert len(render_value("{{ data }}{{ data }}{{ data }}", scope)) == MAX_WRITTEN * 3 // 4  # type: ignore[arg-type]
    assert render_value(["{{ data }}"] * 100, scope) == [scope["data"]] * 100
    for value in ("-{{ data }}", make_operation("upper", "{{ data }}")):
        with pytest.raises(ExpressionError, match="more than 10,000,000 characters"):
            render_value([value, value, value, value, value], scope)
    with pytest.raises(ExpressionError, match="more than 10,000,000 bytes"):
        render_value("-{{ data }}", {"data": [scope["data"]] * 1_000_000})


def test_hostile_texts_are_refused_in_no_time() -> None:
    started = time.process_time()
    for text in (
        "{{" * 500_000,
        "{{ '" + "\\" * 1_000_000,
        '{{ "' + '""' * 500_000,
        "{{ data" + ".a" * 500_000 + " }}",
    ):
        refusal_of(text)
    assert time.process_time() - started < 8


# ── operations in values ────────────────────────────────────────────────────────────────────────────────────


def test_operations_are_computed_wherever_they_stand() -> None:
    value: Json = {
        "x": make_operation("add", "{{ data.user.id }}", make_operation("multiply", 2, 3)),
        "y": [make_operation("upper", "a{{ item }}")],
    }
    assert render_value(value) == {"x": 13, "y": ["AX"]}


def test_a_template_of_a_config_computes_nothing() -> None:
    value: Json = make_operation("add", 1, 1)
    assert compile_template(value).render(SCOPE, []) is value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (make_operation("ad", 1, 2), r"\$op ad: there is no such operation: did you mean pad or add\?"),
        (make_operation("__class__", 1), "there are add, subtract"),
        ({"$op": ["add"], "args": []}, "no such operation"),
        ({"$op": "add"}, '"args"'),
        ({"$op": "add", "args": "{{ data }}"}, '"args"'),
        ({"$op": "add", "args": [1, 2], "more": 1}, '"args"'),
        (make_operation("add", 1), "it takes 2 to 100 arguments, not 1"),
        (make_operation("not-there", "{{ broken"), "no such operation"),
        (make_operation("first", "{{ broken"), "broken"),
        ([make_operation("first", [])] * 1_001, "at most 1,000 operations"),
    ],
)
def test_an_impossible_computation_is_refused_when_it_is_compiled(value: Json, reason: str) -> None:
    with pytest.raises(ExpressionError, match=reason):
        compile_value(value)


def test_wrong_types_are_named_together_with_the_operation() -> None:
    template = compile_value({"x": make_operation("add", "{{ data.user.name }}", 1)})
    with pytest.raises(ExpressionError, match=r"\$op add: needs numbers, not text and number") as caught:
        template.render(SCOPE, [])
    assert caught.value.expression == "$op add"


def test_a_default_replaces_a_missing_value() -> None:
    unresolved: list[str] = []
    template = compile_value(
        [
            make_operation("default", "{{ data.gone }}", 1),
            make_operation("coalesce", "{{ data.a }}", "{{ item }}", "{{ data.b }}"),
        ]
    )
    assert template.render(SCOPE, unresolved) == [1, "x"]
    assert unresolved == []


def test_a_default_that_is_missing_too_is_listed() -> None:
    unresolved: list[str] = []
    template = compile_value(
        make_operation(
            "coalesce",
            "{{ data.a }}",
            make_operation("default", "{{ data.b }}", "{{ data.c }}"),
            "{{ data.d }}",
        )
    )
    assert template.render(SCOPE, unresolved) is None
    assert unresolved == ["data.d"]


def test_a_default_found_is_as_strict_as_any_json() -> None:
    assert render_value(make_operation("default", "{{ data.user.vip }}", decode_json(b"false"))) is True


FALLBACKS: dict[str, Json] = {
    '{{ data.gone ?? "nobody" }}': "nobody",
    '{{ data.user.note ?? "no note" }}': "no note",
    '{{ data.user.name ?? "nobody" }}': "Ada",
    "{{ data.gone ?? data.user.id }}": 7,
    "{{data.gone??nodes.gone.x??data.user.id??0}}": 7,
    "{{ data.gone ?? null }}": None,
    "{{ data.gone ?? -1.5 }}": -1.5,
    "{{ data.gone ?? [1, {}] }}": [1, {}],
    '{{ data.gone ?? {"a": {"b": "}} ?? {{"}} }}': {"a": {"b": "}} ?? {{"}},
    "{{ data.gone ?? true }}": True,
    '{{ data[\'a ?? b\'] ?? data["odd key"]["}}"] }}': "braces",
    'Dear {{ data.gone ?? "you" }}, {{ data.user.name }}{{ data.gone ?? {} }}!': "Dear you, Ada{}!",
}


@pytest.mark.parametrize("text", FALLBACKS)
def test_a_fallback_uses_its_first_present_value(text: str) -> None:
    assert render_value(text) == FALLBACKS[text]


@pytest.mark.parametrize(
    "text",
    [
        """{{ data["a ?? b"] ?? 'data' ?? 1 }}""",
        "{{ data.gone ?? }}",
        "{{ ?? 1 }}",
        "{{ 1 ?? data.gone }}",
        "{{ data.gone ?? nothing }}",
        '{{ data.gone ?? {"a": 1, "a": 2} }}',
        "{{ data.gone ?? NaN }}",
        '{{ data.gone ?? "a" "b" }}',
        "{{ data.gone ?? {} }",
        "{{ " + "data.gone ?? " * 21 + "1 }}",
    ],
)
def test_a_fallback_is_a_path_or_json(text: str) -> None:
    with pytest.raises(ExpressionError):
        compile_template(text)


def test_the_last_path_must_find_something_unless_a_value_follows_it() -> None:
    unresolved: list[str] = []
    template = compile_template(["{{ data.a ?? data.b }}", "{{ data.c ?? null }}"])
    assert template.render(SCOPE, unresolved) == [None, None]
    assert unresolved == ["data.b"]
    assert [path.text for path in template.paths] == ["data.a", "data.b", "data.c"]
    assert [path.text for path in template.needed] == ["data.b"]
