"""SMTP listener with a real client and a real gateway: every mail answered with 250 has a run."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiosmtplib
import pytest
import uvicorn

from bridge.mail_gateway import OK_REPLY, SmtpReply
from bridge.smtp_listener import run_listener, split_recipient, worst_reply
from bridge.smtp_settings import MailProtocol, SmtpListenerSettings
from models.execution import Execution
from tests.certificates import create_certificate
from tests.integration.gateway_harness import GatewayHarness, OrganizationUsers, UserClient
from tests.integration.mail_harness import WORKFLOWS, MailHarness, run_mail_harness

MAIL = (
    "From: Ada <ada@example.org>\r\nTo: b@example.org\r\nSubject: Order\r\nMessage-ID: <{}@x>\r\n\r\n"
    "One apple.\r\n.starts with a dot\r\n"
)


@pytest.fixture(scope="module")
async def mails(harness: GatewayHarness) -> AsyncIterator[MailHarness]:
    async with run_mail_harness(harness) as mails:
        yield mails


@pytest.fixture(scope="module")
async def url(mails: MailHarness) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(mails.harness.app, port=0, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve())
    while not server.started:  # noqa: ASYNC110 - nothing signals the change
        await asyncio.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await serving


@asynccontextmanager
async def open_listener(url: str, **settings: Any) -> AsyncIterator[int]:  # noqa: ANN401 - values of settings
    """Listen as long as the context lasts; yields the port."""
    async with run_listener(SmtpListenerSettings(url=url, smtp_port=0, **settings)) as server:
        port: int = server.sockets[0].getsockname()[1]
        yield port


async def create_address(
    mails: MailHarness, person: UserClient, domain: str = "in.example.org"
) -> tuple[str, str]:
    """Create a workflow with an email trigger; return its id and address."""
    workflow_id = await mails.workflow(person)
    made = await person.api.post(f"{WORKFLOWS}/{workflow_id}/trigger-token", json={})
    assert made.json()["urls"]["mailServer"].endswith(f"/mail/{made.json()['token']}")
    return workflow_id, f"{made.json()['token']}@{domain}"


async def list_runs(mails: MailHarness, workflow_id: str) -> list[str]:
    return [run.id for run in await mails.rows(Execution, workflow_id=workflow_id)]


async def send(port: int, recipients: list[str], raw: str, **options: Any) -> tuple[Any, str]:  # noqa: ANN401 - aiosmtplib's
    async with aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False, **options) as client:
        return await client.sendmail("bounces@example.org", recipients, raw)


async def test_a_mail_is_answered_once_it_has_a_run_and_repeated_it_has_no_second(
    mails: MailHarness, people: OrganizationUsers, url: str
) -> None:
    workflow_id, address = await create_address(mails, people.owner)
    async with open_listener(url) as port:
        for recipient in (address, address.upper().replace("TT-", "tt-"), f"orders+{address}"):
            refused, answer = await send(port, [recipient], MAIL.format(1))
            assert (refused, answer[:5]) == ({}, "2.1.5")
    (execution_id, *others) = await list_runs(mails, workflow_id)
    assert len(others) <= 2  # another way to write the recipient may be another envelope, and so another mail
    await mails.read(execution_id)
    given = await mails.given(execution_id)
    assert given["body_text"] == "One apple.\n.starts with a dot\n"
    assert given["envelope"] == {"from": "bounces@example.org", "to": [address]}


async def test_each_recipient_has_a_run_and_a_stranger_is_refused_at_once(
    mails: MailHarness, people: OrganizationUsers, url: str
) -> None:
    first, of_first = await create_address(mails, people.owner)
    second, of_second = await create_address(mails, people.stranger)
    nobody = "tt-00000000000000000000000000@in.example.org"
    async with open_listener(url) as port:
        refused, _ = await send(port, [of_first, nobody, of_second, "info@in.example.org"], MAIL.format(2))
    assert {name: code for name, (code, _) in refused.items()} == {nobody: 550, "info@in.example.org": 550}
    assert [len(await list_runs(mails, one)) for one in (first, second)] == [1, 1]


async def test_trouble_is_answered_so_that_the_sender_comes_again(
    mails: MailHarness, people: OrganizationUsers, url: str
) -> None:
    workflow_id, address = await create_address(mails, people.owner)
    await mails.set_status(people.owner, workflow_id, "draft")
    async with open_listener(url) as port:
        with pytest.raises(aiosmtplib.SMTPDataError) as later:
            await send(port, [address], MAIL.format(3))
        assert later.value.code == 451
        await mails.set_status(people.owner, workflow_id, "active")
        await send(port, [address], MAIL.format(3))
    assert len(await list_runs(mails, workflow_id)) == 1
    async with open_listener("http://127.0.0.1:1") as port:
        with pytest.raises(aiosmtplib.SMTPRecipientsRefused) as unreachable:
            await send(port, [address], MAIL.format(4))
        assert unreachable.value.recipients[0].code == 451


async def test_lmtp_answers_for_each_recipient(
    mails: MailHarness, people: OrganizationUsers, url: str
) -> None:
    workflow_id, address = await create_address(mails, people.owner)
    draft, of_draft = await create_address(mails, people.owner)
    await mails.set_status(people.owner, draft, "draft")
    async with open_listener(url, smtp_protocol=MailProtocol.LMTP) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        lines = [b"LHLO here", b"MAIL FROM:<a@example.org>"]
        lines += [f"RCPT TO:<{one}>".encode() for one in (address, of_draft)]
        lines += [b"DATA", MAIL.format(5).encode() + b".", b"QUIT"]
        async with asyncio.timeout(60):
            writer.write(b"\r\n".join(lines) + b"\r\n")
            said = (await reader.read()).decode().splitlines()
        writer.close()
    assert [line[:3] for line in said[-3:]] == ["250", "451", "221"]
    assert len(await list_runs(mails, workflow_id)) == 1


async def test_domains_sizes_tls_and_connections_are_as_the_settings_say(
    mails: MailHarness, people: OrganizationUsers, url: str, tmp_path: Path
) -> None:
    workflow_id, address = await create_address(mails, people.owner)
    pem = create_certificate("127.0.0.1", tmp_path)
    tls = {"smtp_tls_certificate": pem, "smtp_tls_key": pem, "smtp_require_tls": True}
    bounds = {"smtp_domains": ("in.example.org",), "smtp_max_bytes": 2_000, "smtp_connections": 1}
    async with open_listener(url, **tls, **bounds) as port:
        with pytest.raises(aiosmtplib.SMTPResponseException) as plain:
            await send(port, [address], MAIL.format(6))
        assert plain.value.code == 530
        context = ssl.create_default_context(cafile=pem)
        context.check_hostname = False
        async with aiosmtplib.SMTP(hostname="127.0.0.1", port=port, start_tls=False) as client:
            await client.starttls(tls_context=context)
            assert (
                client.get_esmtp_extension("size") == "2000"
                if hasattr(client, "get_esmtp_extension")
                else True
            )
            refused, _ = await client.sendmail(
                "a@b.example", [address, address.replace("in.", "out.")], MAIL.format(6)
            )
            assert [code for code, _ in refused.values()] == [550]
            with pytest.raises(aiosmtplib.SMTPResponseException) as large:
                await client.sendmail("a@b.example", [address], MAIL.format(7) + "x" * 3_000)
            assert large.value.code == 552
            with pytest.raises(aiosmtplib.SMTPException) as crowded:
                await send(port, [address], MAIL.format(8))
            assert "421" in str(crowded.value) or getattr(crowded.value, "code", 421) == 421
    assert len(await list_runs(mails, workflow_id)) == 1


@pytest.mark.parametrize(
    ("address", "token", "domain"),
    [
        ("<tt-abc@In.Example>", "tt-abc", "in.example"),
        ("orders+TT-abc@in.example", "tt-abc", "in.example"),
        ('"tt-abc"@in.example', "tt-abc", "in.example"),
        ("info@in.example", None, "in.example"),
        ("tt-abc", None, "tt-abc"),
        ("", None, ""),
    ],
)
def test_a_recipient_is_split_into_token_and_domain(address: str, token: str | None, domain: str) -> None:
    assert split_recipient(address) == (token, domain)


def test_a_failure_that_passes_outweighs_one_that_is_final() -> None:
    passing, final = SmtpReply(451, "later"), SmtpReply(550, "never")
    assert worst_reply([OK_REPLY, final, passing]) is passing
    assert worst_reply([OK_REPLY, final]) is final
    assert worst_reply([OK_REPLY, OK_REPLY]) is OK_REPLY
