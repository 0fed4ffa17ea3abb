from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import inline_secrets
from engine.values import Json
from models.access import new_key

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI0MiJ9.c2lnbmF0dXJl"
PRIVATE_KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIEpAIBAAKCAQEA\n-----END RSA PRIVATE KEY-----"


@pytest.mark.parametrize(
    "name",
    [
        "password", "PASSWORD", "passwd", "pwd", "dbPassword", "smtp_password", "user-password", "password2", "pass",
        "secret", "clientSecret", "client_secret", "webhookSecret", "token", "accessToken", "refresh-token",
        "bot_token", "apiKey", "api_key", "APIKey", "X-API-Key", "apikey", "authorization", "Proxy-Authorization",
        "privateKey", "private_key", "secretAccessKey", "aws_secret_access_key", "client-key", "cookie", "Set-Cookie",
        "connectionString", "passphrase", "encryptionKey",
    ],
)  # fmt: skip
def test_a_literal_under_the_name_of_a_credential_is_one(name: str) -> None:
    assert inline_secrets.find_secrets({"a": {name: "hunter2"}}) == [f"a.{name}"]


@pytest.mark.parametrize(
    "config",
    [
        {"maxTokens": 100}, {"maxTokens": "100"}, {"tokenLimit": "100"}, {"token": 7}, {"password": None},
        {"token": ""}, {"password": "  "}, {"primaryKey": "id"}, {"key": "customer"}, {"publicKey": "abc"},
        {"tokenUrl": "https://a.b"},
        {"passwordField": "pw"}, {"secretName": "db"}, {"nextPageToken": "cursor"}, {"stopToken": "END"},
        {"name": "token", "path": "a"}, {"accessKeyId": "none"}, {"bypass": "yes"}, {"tokens": ["a", "b"]},
    ],
)  # fmt: skip
def test_names_that_only_sound_like_one_are_none(config: Json) -> None:
    assert inline_secrets.remove_secrets(config) == (config, [])


@pytest.mark.parametrize(
    "text",
    [
        "{{ data.token }}", "Bearer {{ nodes.login.token }}", "data.user.token", "$.trigger.headers['x-token']",
        "${API_KEY}", "$API_KEY", "%API_KEY%", "<your key>", "********", "none", "Bearer", "OAuth2",
        "ds_01m8gqqrtae0msda9c64bp8v47",
    ],
)  # fmt: skip
def test_references_to_credentials_are_no_credentials(text: str) -> None:
    assert (
        inline_secrets.find_secrets({"token": text, "headers": {"authorization": text}, "note": text}) == []
    )


@pytest.mark.parametrize(
    "text",
    [
        "sk-proj-abcdefghijklmnop123456", "sk_live_4eC39HqLyjWDarjtT1zdp7dc", "AKIAIOSFODNN7EXAMPLE",
        "ghp_abcdefghijklmnopqrstuvwxyz0123456789", "github_pat_11ABCDEFG0abcdefghijkl", "glpat-abcdefghij0123456789",
        "xoxb-123456789012-abcdefghijkl", "xoxp-123456789012-abcdefghijkl", "AIzaSyA1234567890abcdefghijklmnopqrstuv",
        "SG.abcdefghijklmnop1234.abcdefghijklmnop1234", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", JWT, PRIVATE_KEY,
        "Bearer abc123def456", "bearer " + "a" * 24, "Basic dXNlcjpwYXNzd29yZA==", "postgresql://user:hunter2@host/db",
        "redis://:hunter2@host:6379", "https://user:p@ss@example.com/{{ data.id }}",
        "https://hooks.slack.com/services/T00000000/B00000000/XXXXXXXXXXXXXXXXXXXXXXXX",
        "https://discord.com/api/webhooks/123456789/abcdefghijk", "https://example.com/?page=1&api_key=hunter2",
        "Server=db;User Id=sa;Password=hunter2;", "AccountName=a;AccountKey=abcdefghijklmnop1234567890==",
        '{"user": "ada", "password": "hunter2"}', "login(password='hunter2')",
    ],
)  # fmt: skip
def test_the_shape_of_a_credential_tells_it_under_any_name(text: str) -> None:
    assert inline_secrets.remove_secrets({"note": text, "other": [1, text]}) == (
        {"other": [1, ""]},
        ["note", "other.1"],
    )


def test_a_key_of_our_own_is_told_by_its_shape() -> None:
    assert inline_secrets.find_secrets({"note": new_key()}) == ["note"]


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com:8080/a@b?x=1", "https://{{ data.user }}:{{ data.password }}@example.com",
        "Basic authentication is on", "the bearer of this letter", "task-force-of-many-people-at-work",
        "ada@example.com",
        "https://example.com/?token={{ data.token }}&key=customer", "connect(password=read_password())",
        '{"type": "token", "tokenType": "access"}', "SELECT * FROM orders WHERE id = 'abc'", "eyJ.eyJ.", "sk-short",
        "password: at least eight characters", "https://hooks.slack.com/services/{{ data.hook }}",
    ],
)  # fmt: skip
def test_texts_that_faintly_resemble_credentials_stay(text: str) -> None:
    assert inline_secrets.find_secrets({"note": text}) == []


@pytest.mark.parametrize(
    ("config", "paths"),
    [
        ({"headers": [{"name": "Authorization", "value": "hunter2"}]}, ["headers.0.value"]),
        ({"headers": [{"key": "Accept", "value": "text/html"}]}, []),
        ({"password": {"type": "text", "value": "hunter2"}}, ["password.value"]),
        ({"token": {"$op": "concat", "args": ["hunter", "2"]}}, ["token.args.0", "token.args.1"]),
        ({"apiKeys": ["a", "b"]}, ["apiKeys.0", "apiKeys.1"]),
    ],
)
def test_the_name_may_stand_beside_or_above_the_value(config: Json, paths: list[str]) -> None:
    assert inline_secrets.find_secrets(config) == paths


def test_of_a_text_of_several_lines_only_the_credential_goes() -> None:
    program = (
        f'import api\nkey = "{JWT}"\npassword = "hunter2"\ncall("https://ada:hunter2@example.com/x", key)\n'
    )
    kept, paths = inline_secrets.remove_secrets({"code": program, "certificate": f"{PRIVATE_KEY}\n"})
    assert kept == {"code": 'import api\nkey = ""\npassword = ""\ncall("https://example.com/x", key)\n'}
    assert paths == ["code", "certificate"]


def test_more_credentials_than_are_told_are_left_out_all_the_same() -> None:
    kept, paths = inline_secrets.remove_secrets([{"password": "hunter2"}] * (inline_secrets.MAX_PATHS + 5))
    assert kept == [{}] * (inline_secrets.MAX_PATHS + 5)
    assert len(paths) == inline_secrets.MAX_PATHS


def test_a_value_is_left_as_it_was() -> None:
    value: Json = {"a": {"password": "hunter2", "b": 1}}
    assert inline_secrets.remove_secrets(value) == ({"a": {"b": 1}}, ["a.password"])
    assert value == {"a": {"password": "hunter2", "b": 1}}


PIECES = [
    "sk-", "AKIA", "eyJ", ".", "a" * 20, "://", "u:p@", "password", '="', '"', "Bearer ", "\n", "{{ x }}", "&", "=",
    "-----BEGIN PRIVATE KEY-----",
]  # fmt: skip


@given(st.recursive(
    st.lists(st.sampled_from(PIECES), max_size=8).map("".join) | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["token", "value", "a"]), inner),
    max_leaves=10,
))  # fmt: skip
def test_no_secrets_are_found_after_their_removal(value: Json) -> None:
    kept, _ = inline_secrets.remove_secrets(value)
    assert inline_secrets.remove_secrets(kept) == (kept, [])


@pytest.mark.parametrize(
    "piece",
    [
        "a",
        "sk-",
        "eyJ",
        "eyJaaaaaa.",
        "://a:",
        "://a:b@",
        'token="',
        "-----BEGIN PRIVATE KEY-----",
        "bearer ",
        "?a=",
    ],
)
def test_the_time_grows_with_the_length_alone(piece: str) -> None:
    text = piece * (500_000 // len(piece))
    started = time.process_time()
    inline_secrets.find_secrets({"note": text})
    assert time.process_time() - started < 8, "a pattern that goes back would take minutes"


def test_a_credential_that_stands_in_for_a_missing_path_is_one() -> None:
    assert inline_secrets.find_secrets(
        {"apiKey": '{{ data.key ?? "hunter2-hunter2" }}', "password": "{{ data.password ?? null }}"}
    ) == ["apiKey"]
    mappings: Json = {
        "apiKey": "data.key ?? trigger.body.key ?? null",
        "token": 'data.token ?? "hunter2-hunter2"',
    }
    assert inline_secrets.find_secrets(mappings) == ["token"]
