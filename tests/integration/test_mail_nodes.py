"""Nodes that read and send mail, against a real mail server and real storage."""

from __future__ import annotations

import asyncio
import copy
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import pytest

from engine.run_errors import NodeError
from engine.services import RunCaller
from engine.values import Json
from execution.node_blobs import NodeBlobs
from gateway.data_sources.data_source_probes import DataSourceProber
from journal.blobs.blob_store_factory import open_blobs
from mail import composition, headers, mail_content, mail_parsing
from models.data_source import DataSource, encrypt_secrets
from models.encryption import SecretVault
from models.settings import ServerSettings
from nodes import catalog
from nodes.connections import smtp_mail_server
from nodes.connections.data_source import ConnectionSource
from nodes.connections.data_source_connections import DataSourceConnections
from nodes.connections.data_source_policy import ConnectionPolicy
from tests import certificates, smtp_server
from tests.node_calls import CALLER, NOW, CallRecord, call
from tests.smtp_server import PASSWORD, USERNAME, FakeMailServer

HOST = "mail.example"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))


@dataclass
class MailNodeHarness:
    """A mail server, a data source that leads to it, and a place for attachments."""

    server: FakeMailServer
    connections: DataSourceConnections
    source: ConnectionSource
    blobs: NodeBlobs

    async def find(self, caller: RunCaller, source_id: str) -> ConnectionSource:
        assert (caller, source_id) == (CALLER, "ds_001")
        return self.source

    async def send(self, **config: Json) -> CallRecord:
        told: dict[str, Json] = {
            "dataSource": "ds_001",
            "from": "Shop <shop@example.com>",
            "to": "ada@example.org",
        }
        return await self.call("email-send", {**told, **config})

    async def call(self, node_type: str, config: Mapping[str, Json], data: Json = None) -> CallRecord:
        return await call(node_type, config, data, data_sources=self.connections, blobs=self.blobs)

    async def refused(self, **config: Json) -> NodeError:
        with pytest.raises(NodeError) as raised:
            await self.send(**config)
        assert self.server.received == []
        return raised.value

    def changed(self, **settings: Json) -> None:
        """Change the data source."""
        secrets = {} if settings.get("username", USERNAME) is None else {"password": PASSWORD}
        known = {**self.source.settings, **settings}
        self.source = ConnectionSource(
            "ds_001",
            "org_1",
            "smtp",
            1,
            {key: value for key, value in known.items() if value is not None},
            secrets,
        )


async def resolve_to_loopback(_name: str) -> list[str]:
    return ["127.0.0.1"]


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates.create_certificate(HOST, tmp_path_factory.mktemp("certificate"))


@pytest.fixture
async def mail_node_harness(
    tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[MailNodeHarness]:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    blobs = open_blobs(ServerSettings(data_dir=tmp_path))
    async with smtp_server.serve_smtp(certificate) as server:
        settings: dict[str, Json] = {"host": HOST, "port": server.port, "username": USERNAME}
        source = ConnectionSource("ds_001", "org_1", "smtp", 1, settings, {"password": PASSWORD})
        found = MailNodeHarness(server, None, source, NodeBlobs(blobs))  # type: ignore[arg-type]  # set below
        policy = ConnectionPolicy(allowed_networks=(ip_network("127.0.0.0/8"),))
        found.connections = DataSourceConnections(found, policy, resolve_to_loopback)
        yield found
        await found.connections.close()
    await blobs.close()


@pytest.mark.parametrize(
    ("node_type", "example"),
    [
        (name, example)
        for name in ("email-parse", "attachment-read", "email-send")
        for example in catalog.load_catalog().get(name).examples
    ],
)
async def test_every_example_comes_true(
    mail_node_harness: MailNodeHarness, node_type: str, example: dict[str, Any]
) -> None:
    await mail_node_harness.blobs.put(CALLER, b"city,celsius\nOslo,12.5\nRome,27\n", media_type="text/csv")
    data = copy.deepcopy(example["input"])
    output = (await mail_node_harness.call(node_type, example["config"], data)).output
    assert isinstance(output, dict)
    if node_type == "email-send":
        output["messageId"] = example["output"]["messageId"]  # which is the run's own
    assert output == example["output"]
    assert data == example["input"]


# ── sending ─────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_mail_arrives_as_it_was_meant(mail_node_harness: MailNodeHarness) -> None:
    picture = await mail_node_harness.blobs.put(CALLER, PNG, media_type="image/png", name="p.png")
    report = await mail_node_harness.blobs.put(
        CALLER, b"a;b\n", media_type="text/csv; charset=utf-8", name="bericht ü.csv"
    )
    called = await mail_node_harness.send(
        to=["Ada Löv <ada@example.org>", '"Bob, Jr." <bob@bücher.example>'],
        cc="carl@example.org, ada@example.org",
        bcc="secret@example.org",
        replyTo="desk@example.com",
        subject="Grüße: " + "lang " * 40,
        text="Hallo\n.\n..\nÄ\n",
        html='<p>Ä</p><img src="cid:pic@here">',
        headers={"In-Reply-To": "<1@example.org>", "X-Run": 7, "X-None": None},
        attachments=[
            {"filename": "p.png", "content_type": "image/png", "content_id": "pic@here", "blob": picture},
            report,
            {
                "filename": "../a.eml",
                "content_type": "message/rfc822",
                "base64": b64encode(b"Subject: x\n\n").decode(),
            },
        ],
    )
    recipients = ["ada@example.org", "bob@xn--bcher-kva.example", "carl@example.org", "secret@example.org"]
    assert called.output == {
        "messageId": composition.make_message_id("exec:node:0", "example.com"),
        "recipients": recipients,
        "count": 4,
    }
    (received,) = mail_node_harness.server.received
    assert (received.sender, received.recipients) == ("shop@example.com", recipients)
    assert (received.was_encrypted, received.was_logged_in) == (True, True)
    assert received.content.isascii()
    assert b"secret" not in received.content
    contents: list[bytes] = []
    mail = mail_parsing.parse_mail(
        received.content, lambda _, pieces: contents.append(mail_content.join_pieces(pieces))
    )
    assert mail.from_ == "Shop <shop@example.com>"
    assert mail.to == 'Ada Löv <ada@example.org>, "Bob, Jr." <bob@xn--bcher-kva.example>'
    assert (mail.subject, mail.body_text) == ("Grüße: " + ("lang " * 40).strip(), "Hallo\n.\n..\nÄ\n")
    assert mail.body_html.strip() == '<p>Ä</p><img src="cid:pic@here">'
    assert contents == [PNG, b"a;b\n", b"Subject: x\n\n"]
    assert [
        (each.label.filename, each.label.content_type, each.label.content_id, each.label.disposition)
        for each in mail.attachments
    ] == [
        ("p.png", "image/png", "pic@here", "inline"),
        ("bericht ü.csv", "text/csv", "", "attachment"),
        ("a.eml", "application/octet-stream", "", "attachment"),
    ]
    told = mail.email_headers
    assert {
        name: told.get(name)
        for name in ("Auto-Submitted", "Reply-To", "Date", "In-Reply-To", "X-Run", "X-None", "Bcc")
    } == {
        "Auto-Submitted": "auto-generated",
        "Reply-To": "desk@example.com",
        "Date": "Thu, 01 Jan 2026 00:00:00 +0000",
        "In-Reply-To": "<1@example.org>",
        "X-Run": "7",
        "X-None": None,
        "Bcc": None,
    }
    assert headers.bare_addresses(str(told["Cc"])) == ["carl@example.org", "ada@example.org"]


async def test_a_second_attempt_is_the_same_mail(mail_node_harness: MailNodeHarness) -> None:
    for _ in range(2):
        await mail_node_harness.send(text="once")
    first, second = (
        mail_parsing.parse_mail(each.content, lambda *_: None) for each in mail_node_harness.server.received
    )
    assert first.message_id == second.message_id
    assert composition.is_workflow_mail(first.message_id)
    assert not composition.is_workflow_mail("<x.pilotflame.1@example.com>")


async def test_a_mail_is_sent_when_it_is_taken_however_long_the_goodbye_lasts(
    mail_node_harness: MailNodeHarness,
) -> None:
    mail_node_harness.server.leaves_nobody = True
    await asyncio.wait_for(mail_node_harness.send(text="once", timeoutSeconds=300), 60)
    assert len(mail_node_harness.server.received) == 1


async def test_a_mail_of_ten_megabytes_arrives_whole_and_one_too_large_is_not_begun(
    mail_node_harness: MailNodeHarness,
) -> None:
    content = bytes(range(256)) * 40_000
    blob = await mail_node_harness.blobs.put(CALLER, content, media_type="application/pdf", name="a.pdf")
    assert (await mail_node_harness.refused(attachments=[blob, blob])).code == "mail-too-large"
    await mail_node_harness.send(attachments=[blob])
    contents: list[bytes] = []
    mail_parsing.parse_mail(
        mail_node_harness.server.received[0].content,
        lambda _, pieces: contents.append(mail_content.join_pieces(pieces)),
    )
    assert contents == [content]


@pytest.mark.parametrize(
    ("config", "code"),
    [
        ({"subject": "a\r\nBcc: eve@example.net"}, "invalid-header"),
        ({"subject": "a\u2028b"}, "invalid-header"),
        ({"to": "ada@example.org\r\nBcc: eve@example.net"}, "invalid-address"),
        ({"to": "ada@example.org>\r\nRCPT TO:<eve@example.net"}, "invalid-address"),
        ({"from": "Shop\nX: <shop@example.com>"}, "invalid-address"),
        ({"replyTo": ["a@b\n"]}, "invalid-address"),
        ({"headers": {"X-A": "a\nb"}}, "invalid-header"),
        ({"headers": {"X-A\r\nBcc": "a"}}, "invalid-header"),
        ({"headers": {"bcc": "eve@example.net"}}, "invalid-header"),
        ({"headers": {"Content-Type": "text/html"}}, "invalid-header"),
        ({"headers": {"X-A": "a\x85b"}}, "invalid-header"),
        ({"to": "", "cc": [""]}, "invalid-address"),
        ({"to": "ada"}, "invalid-address"),
        ({"to": "ada@exa mple.org"}, "invalid-address"),
        ({"to": "ä@example.org"}, "invalid-address"),
        ({"to": [7]}, "invalid-config"),
        ({"from": "a@example.org, b@example.org"}, "invalid-address"),
        ({"to": [f"a{n}@example.org" for n in range(101)]}, "too-many-recipients"),
        ({"attachments": [{"filename": "a"}]}, "invalid-config"),
        ({"attachments": [{"base64": "*"}]}, "invalid-encoding"),
        ({"attachments": [{"name": "a", "text": 7}]}, "invalid-config"),
        ({"attachments": [{"name": "a", "text": "a", "base64": "YQ=="}]}, "invalid-config"),
        ({"attachments": [{"name": "a", "text": "ä" * 7_500_001}]}, "mail-too-large"),
        ({"attachments": [{"$blob": {"sha256": "0" * 64, "size": 1}}]}, "blob-not-found"),
    ],
)
async def test_input_for_several_mails_is_refused(
    mail_node_harness: MailNodeHarness, config: dict[str, Json], code: str
) -> None:
    error = await mail_node_harness.refused(**config)
    assert (error.code, error.retryable) == (code, False)
    assert mail_node_harness.server.logins == []


async def test_a_text_is_attached_as_a_file_of_its_name(mail_node_harness: MailNodeHarness) -> None:
    report = "city;°C\nOslo;12,5\n.\n"
    await mail_node_harness.send(
        attachments=[
            {"name": "Bericht ü.CSV", "text": report},
            {"name": "a.json", "text": '{"a": "ä"}'},
            {"filename": "a.txt", "text": ""},
            {"name": "a.csv", "content_type": "text/plain", "text": "plain"},
        ]
    )
    contents: list[bytes] = []
    mail = mail_parsing.parse_mail(
        mail_node_harness.server.received[0].content,
        lambda _, pieces: contents.append(mail_content.join_pieces(pieces)),
    )
    assert contents == [report.encode(), '{"a": "ä"}'.encode(), b"", b"plain"]
    labels = [each.label for each in mail.attachments]
    assert [(each.filename, each.media_type) for each in labels] == [
        ("Bericht ü.CSV", "text/csv; charset=utf-8"),
        ("a.json", "application/json"),
        ("a.txt", "text/plain; charset=utf-8"),
        ("a.csv", "text/plain; charset=utf-8"),
    ]


async def test_a_name_with_line_ends_of_a_file_adds_no_header(mail_node_harness: MailNodeHarness) -> None:
    await mail_node_harness.send(
        attachments=[{"filename": "a\r\nBcc: eve@example.net\r\n\r\nx.txt", "base64": "aGk="}]
    )
    mail = mail_parsing.parse_mail(mail_node_harness.server.received[0].content, lambda *_: None)
    assert "Bcc" not in mail.email_headers
    assert [each.label.filename for each in mail.attachments] == ["aBcc: eve@example.netx.txt"]


@pytest.mark.parametrize(
    ("refused", "answer", "code", "retryable"),
    [
        ("bob@example.org", "550 no such user", "recipient-refused", False),
        ("bob@example.org", "450 greylisted", "recipient-refused", True),
        ("DATA", "552 too much", "mail-refused", False),
        ("DATA", "451 later", "mail-refused", True),
    ],
)
async def test_a_refusal_says_whether_another_attempt_is_worth_it(
    mail_node_harness: MailNodeHarness, refused: str, answer: str, code: str, *, retryable: bool
) -> None:
    mail_node_harness.server.answers[refused] = answer
    error = await mail_node_harness.refused(to="ada@example.org, bob@example.org")
    assert (error.code, error.retryable) == (code, retryable)
    assert answer in error.message


async def test_no_password_is_sent_before_the_server_has_proven_its_identity(
    mail_node_harness: MailNodeHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    mail_node_harness.changed(host="other.example")
    assert (await mail_node_harness.refused()).code == "tls-failed"
    mail_node_harness.changed(host=HOST)
    monkeypatch.delenv("SSL_CERT_FILE")
    assert (await mail_node_harness.refused()).code == "tls-failed"
    async with smtp_server.serve_smtp(tls="none") as plain:
        mail_node_harness.changed(port=plain.port)
        error = await mail_node_harness.refused()
        assert (error.code, error.retryable) == ("tls-failed", False)
        mail_node_harness.changed(tls="tls")
        assert (await mail_node_harness.refused()).code == "tls-failed"
        assert (plain.logins, plain.received) == ([], [])
    assert mail_node_harness.server.logins == []


@pytest.mark.parametrize("tls", ["tls", "none"])
async def test_a_way_is_taken_as_the_data_source_says(
    mail_node_harness: MailNodeHarness, certificate: Path, tls: str
) -> None:
    async with smtp_server.serve_smtp(certificate if tls == "tls" else None, tls=tls) as other:
        mail_node_harness.changed(port=other.port, tls=tls)
        await mail_node_harness.send()
        assert len(other.received) == 1
        assert {(username, password) for username, password, _ in other.logins} == {(USERNAME, PASSWORD)}


async def test_a_login_that_is_refused_shows_no_password(mail_node_harness: MailNodeHarness) -> None:
    mail_node_harness.source = ConnectionSource(
        "ds_001", "org_1", "smtp", 1, mail_node_harness.source.settings, {"password": "wrong-canary"}
    )
    error = await mail_node_harness.refused()
    assert (error.code, error.retryable) == ("login-refused", False)
    assert "canary" not in error.message


async def test_a_connection_that_breaks_at_the_end_leaves_it_open_whether_the_mail_was_taken(
    mail_node_harness: MailNodeHarness,
) -> None:
    mail_node_harness.server.breaks_after_data = True
    with pytest.raises(NodeError) as raised:
        await mail_node_harness.send()
    assert (raised.value.code, raised.value.retryable) == ("delivery-unknown", True)


@pytest.mark.parametrize(
    ("greeting", "code", "retryable"),
    [
        (b"", "timeout", True),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "connection-failed", False),
        (b"220 " + b"x" * 40_000, "connection-failed", False),
        (b"554 go away\r\n", "connection-failed", False),
        (b"421 too busy\r\n", "connection-failed", True),
        (b"220 ok\r\n", "timeout", True),
    ],
)
async def test_any_server_answer_only_refuses_the_connection(
    mail_node_harness: MailNodeHarness, greeting: bytes, code: str, *, retryable: bool
) -> None:
    opened: list[asyncio.StreamWriter] = []

    def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        writer.write(greeting)

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        mail_node_harness.changed(port=server.sockets[0].getsockname()[1])
        error = await mail_node_harness.refused(timeoutSeconds=0.3)
        for each in opened:
            each.close()
    assert (error.code, error.retryable) == (code, retryable)


async def test_a_server_is_only_where_mail_may_be_sent(mail_node_harness: MailNodeHarness) -> None:
    policy = ConnectionPolicy()
    for host, port in (("127.0.0.1", 25), (HOST, 587), ("8.8.8.8", 22)):
        mail_node_harness.changed(host=host, port=port)
        mail_node_harness.connections = DataSourceConnections(mail_node_harness, policy, resolve_to_loopback)
        assert (await mail_node_harness.refused()).code == "address-not-allowed"
    assert (await mail_node_harness.refused()).retryable is False


def test_no_line_of_a_mail_ends_it() -> None:
    for written, sent in (
        (b".\r\n.a\r\nb", b"..\r\n..a\r\nb\r\n.\r\n"),
        (b"a\n.\nb\r.\r", b"a\r\n..\r\nb\r\n..\r\n.\r\n"),
        (b"", b"\r\n.\r\n"),
    ):
        assert smtp_mail_server._stuff_dots(written) == sent  # noqa: SLF001 - smuggled mails are made of exactly this


# ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────

RAW = b"\r\n".join([
    *(b"From: a@b", b"To: c@d", b"Subject: s", b"Content-Type: multipart/mixed; boundary=b", b""),
    *(b"--b", b"", b"text"),
    *(b"--b", b"Content-Type: text/plain; charset=iso-8859-1; name=../l.txt", b"", b"\xe9"),
    *(b"--b", b"Content-Type: application/json; name=a.json", b"", b'{"a":[1]}'),
    *(b"--b", b"Content-Type: image/png; name=p", b"Content-Transfer-Encoding: base64", b"", b64encode(PNG)),
    b"--b--",
])  # fmt: skip


async def test_a_mail_is_read_from_a_file_and_from_base64_and_its_attachments_from_there(
    mail_node_harness: MailNodeHarness,
) -> None:
    blob = await mail_node_harness.blobs.put(CALLER, RAW, media_type="message/rfc822")
    parsed = (await mail_node_harness.call("email-parse", {"mail": "{{ data.raw }}"}, {"raw": blob})).output
    config: dict[str, Json] = {"mail": b64encode(RAW).decode(), "encoding": "base64"}
    assert (await mail_node_harness.call("email-parse", config)).output == parsed
    assert isinstance(parsed, dict)
    assert (parsed["subject"], parsed["body_text"]) == ("s", "text")
    text = {"format": "text", "filename": "l.txt", "content_type": "text/plain", "size": 1}
    value = {"format": "json", "filename": "a.json", "content_type": "application/json", "size": 9}
    picture = {"format": "base64", "filename": "p", "content_type": "image/png", "size": len(PNG)}
    for number, wanted, output in (
        (0, "auto", {**text, "text": "é"}),
        (1, "auto", {**value, "value": {"a": [1]}}),
        (2, "auto", {**picture, "base64": b64encode(PNG).decode()}),
        (1, "text", {**value, "format": "text", "text": '{"a":[1]}'}),
        (0, "base64", {**text, "format": "base64", "base64": "6Q=="}),
    ):
        asked: dict[str, Json] = {"attachment": f"{{{{ data.attachments.{number} }}}}", "as": wanted}
        assert (await mail_node_harness.call("attachment-read", asked, parsed)).output == output


@pytest.mark.parametrize(
    ("node_type", "config", "code"),
    [
        ("email-parse", {"mail": "*", "encoding": "base64"}, "invalid-encoding"),
        ("email-parse", {"mail": "X: " + "y" * 300_000}, "invalid-mail"),
        ("email-parse", {"mail": {"$blob": {"sha256": "0" * 64, "size": 1}}}, "blob-not-found"),
        ("attachment-read", {"attachment": {"url": "https://storage.example/1"}}, "invalid-blob"),
        ("attachment-read", {"attachment": {"filename": "a"}}, "invalid-config"),
        ("attachment-read", {"attachment": "{{ data }}", "maxBytes": 10}, "blob-too-large"),
        ("attachment-read", {"attachment": "{{ data }}", "as": "json"}, "invalid-json"),
    ],
)
async def test_a_refusal_to_read_gives_its_reason(
    mail_node_harness: MailNodeHarness, node_type: str, config: dict[str, Json], code: str
) -> None:
    blob = await mail_node_harness.blobs.put(CALLER, b"no json at all", media_type="text/plain")
    with pytest.raises(NodeError) as raised:
        await mail_node_harness.call(node_type, config, blob)
    assert (raised.value.code, raised.value.retryable) == (code, False)


# ── a data source is tried ──────────────────────────────────────────────────────────────────────────────────


async def test_a_mail_server_is_tested_by_logging_in(
    mail_node_harness: MailNodeHarness, tmp_path: Path
) -> None:
    networks = (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    vault = SecretVault(b"a-secret-of-the-server-that-is-long-enough", [])
    probes = DataSourceProber(vault, ServerSettings(data_dir=tmp_path, outbound_allowed_networks=networks))

    async def probed(password: str, **settings: Json) -> tuple[bool, str, list[tuple[str, bool]]]:
        secrets: dict[str, object] = {"password": password}
        kept = encrypt_secrets(vault, secrets, organization_id="org_1", source_id="ds_001")
        found = await probes.probe(
            DataSource(
                id="ds_001",
                organization_id="org_1",
                shard=0,
                owner_id="user_1",
                name="Mail",
                type="smtp",
                settings={
                    "host": "localhost",
                    "port": mail_node_harness.server.port,
                    "username": USERNAME,
                    **settings,
                },
                secret_names=[*secrets],
                encrypted=kept.content,
                secret_id=kept.secret_id,
                secrets_set_at=NOW,
                created_at=NOW,
                updated_at=NOW,
            )
        )
        return found.is_ok, found.message, [(one.phase.value, one.is_ok) for one in found.phases]

    begun = [("dns", True), ("tcp", True), ("tls", True)]
    assert await probed(PASSWORD) == (True, "The mail server accepts the login", [*begun, ("auth", True)])
    assert await probed("wrong") == (
        False,
        "The mail server refused the login (535)",
        [*begun, ("auth", False)],
    )
    _, message, phases = await probed(PASSWORD, port=1)
    assert message.startswith("No connection to the mail server")
    assert phases == [("dns", True), ("tcp", False)]
    assert mail_node_harness.server.received == []
