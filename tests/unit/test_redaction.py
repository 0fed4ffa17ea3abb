import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.run_errors import NodeError
from nodes import redaction


@pytest.mark.parametrize(
    ("secrets", "text", "shown"),
    [
        (["s3cret"], "xs3crety s3cret", "x[hidden]y [hidden]"),
        (["pass", "password"], "password pass", "[hidden] [hidden]"),
        (["p"], 'No connection: password "p" is wrong', 'No connection: password "[hidden]" is wrong'),
        (["p"], "p", "[hidden]"),
        (["p"], "no p.", "no [hidden]."),
        (["o"], "No connection to the host", "No connection to the host"),
        (["1"], "Port 1123 at 10.1.0.1, user=1", "Port 1123 at 10.1.0.1, user=[hidden]"),
        (["-"], "a-b --", "a-b --"),
        ([""], "as it was", "as it was"),
        (["(*"], "one (* two(*", "one [hidden] two(*"),
    ],
)
def test_a_short_secret_is_hidden_where_it_stands_by_itself(
    secrets: list[str], text: str, shown: str
) -> None:
    assert redaction.redact_text(text, secrets) == shown


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ('{"key": "1", "n": 1, "m": [1, 12]}', '{"key": "[hidden]", "n": 1, "m": [1, 12]}'),
        ("<a key='1'>1</a>", "<a key='[hidden]'>1</a>"),
        ("user=x&key=1&n=12", "user=x&key=[hidden]&n=12"),
        ("1", "[hidden]"),
        ("11", "11"),
    ],
)
def test_a_body_is_unchanged_around_a_short_secret(body: str, shown: str) -> None:
    assert redaction.redact_body(body.encode(), ["1"]).decode() == shown


@pytest.mark.parametrize("secret", ["a", "1", "ab", "{", '"', "\\"])
def test_a_body_of_json_stays_json(secret: str) -> None:
    body = json.dumps({"a": "a", "b": 1, "c": ["ab", {"d": 'x"y\\'}]}).encode()
    json.loads(redaction.redact_body(body, [secret]))


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Wrong key: s3cret-key", "Wrong key: [hidden]"),
        ("Wrong key: s3cret-k", "Wrong key: [hidden]"),
        ("Wrong key: s3cr", "Wrong key: [hidden]"),
        ("Wrong key: s3", "Wrong key: s3"),
        ("The s3cret answer", "The s3cret answer"),
    ],
)
def test_the_beginning_of_a_secret_is_hidden_at_the_end_of_an_excerpt(text: str, shown: str) -> None:
    assert redaction.redact_excerpt(text, ["s3cret-key"]) == shown


def test_a_secret_is_hidden_in_a_value_however_it_was_escaped() -> None:
    value = json.loads(r'{"said": ["a \"quoted\" key", 1, null], "\u0061 \"quoted\" key": {"n": true}}')
    shown = {"said": ["[hidden]", 1, None], "[hidden]": {"n": True}}
    assert redaction.redact_value(value, ['a "quoted" key']) == shown


@pytest.mark.parametrize("secret", ["sk-live-keys", "abab", "aaaa"])
@pytest.mark.parametrize("rest", ["", " is the key", "s"])
def test_a_secret_that_ends_with_its_beginning_is_hidden_at_the_end_of_a_piece(
    secret: str, rest: str
) -> None:
    redactor = redaction.PieceRedactor([secret])
    shown = redactor.feed(f"The key: {secret}") + redactor.feed(rest) + redactor.finish()
    assert shown == f"The key: [hidden]{rest}"


@settings(max_examples=300)
@given(
    text=st.text(alphabet="ab1 :", max_size=40),
    secret=st.sampled_from(["abab", "abba1", "a", "1", "ab", "aab"]),
    data=st.data(),
)
def test_a_text_in_pieces_shows_a_secret_no_more_than_the_whole_text(
    text: str, secret: str, data: st.DataObject
) -> None:
    """Each part is redacted as in the whole text, but for short secrets, which are redacted within words too."""
    redactor, shown, rest = redaction.PieceRedactor([secret]), "", text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        shown += redactor.feed(rest[:size])
        rest = rest[size:]
        assert not (len(secret) >= redaction.SHORTEST_ANYWHERE and secret in shown)
    shown += redactor.finish()
    whole = redaction.redact_text(text, [secret])
    if len(secret) >= redaction.SHORTEST_ANYWHERE:
        assert shown == whole
    else:
        assert shown.count(redaction.REDACTED) >= whole.count(redaction.REDACTED)
        assert shown.replace(redaction.REDACTED, secret) == text


def test_a_redacted_error_is_retried_like_the_original() -> None:
    original = NodeError(
        "Key sk-1234 is busy", code="model-rate-limited", retryable=True, retry_after_seconds=7
    )
    with pytest.raises(NodeError) as raised, redaction.redact_errors(["sk-1234"]):
        raise original
    error = raised.value
    assert error.message == "Key [hidden] is busy"
    assert (error.code, error.retryable, error.retry_after_seconds) == ("model-rate-limited", True, 7)
