"""SMTP and LMTP listener that turns mails to the addresses of e-mail triggers into runs.

A recipient is a trigger token in any domain, alone or after a plus sign: `tt-…@mail.example.com`, `invoices+tt-…@…`. A
mail gets 250 once the runs of all of its recipients are committed. Repeated mails are deduplicated, so a mail server
may repeat a mail for all recipients after a partial failure.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import structlog
from aiosmtpd.lmtp import LMTP
from aiosmtpd.smtp import SMTP

from bridge.mail_gateway import NO_SUCH_ADDRESS_REPLY, OK_REPLY, MailGateway, SmtpReply
from bridge.smtp_settings import MailProtocol
from concurrency import heartbeat

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from aiosmtpd.smtp import Envelope, Session

    from bridge.smtp_settings import SmtpListenerSettings

log = structlog.get_logger()

TOKEN_PREFIX: Final = "tt-"  # noqa: S105 - prefix of trigger tokens
IDLE_SECONDS: Final = 300.0
"""Minimum timeout of servers (RFC 5321, section 4.5.3.2)."""
SHUTDOWN_SECONDS: Final = 20.0
MAX_RECIPIENTS: Final = 100
SERVER_NAME: Final = "Pilotflame"
TOO_MANY_CONNECTIONS_REPLY: Final = b"421 4.3.2 Too many connections: try again later\r\n"
WRONG_DOMAIN_REPLY: Final = SmtpReply(550, "5.7.1 Mail for this domain is not accepted")
TOO_MANY_RECIPIENTS_REPLY: Final = SmtpReply(452, "4.5.3 Too many recipients")


class SmtpMailHandler:
    """Handler for aiosmtpd: checks recipients and posts mails to the gateway."""

    def __init__(self, gateway: MailGateway, domains: Sequence[str], protocol: MailProtocol) -> None:
        self._gateway = gateway
        self._domains = frozenset(domains)
        self._protocol = protocol
        self._handed_over = 0
        self.at_rest = asyncio.Event()
        """Set while no mail is being posted."""
        self.at_rest.set()

    async def handle_RCPT(  # noqa: N802 - aiosmtpd's name
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: Sequence[str]
    ) -> str:
        """Handle a recipient of the mail server (RCPT TO); return the SMTP reply and keep accepted recipients.

        Refused are other domains than the configured ones (none configured: all are accepted), recipients after the
        100th, addresses without a trigger token, and addresses that the gateway refuses or can't check.
        """
        del server, session
        token, domain = split_recipient(address)
        if self._domains and domain not in self._domains:
            return WRONG_DOMAIN_REPLY.line
        if len(envelope.rcpt_tos) >= MAX_RECIPIENTS:
            return TOO_MANY_RECIPIENTS_REPLY.line
        reply = NO_SUCH_ADDRESS_REPLY if token is None else await self._gateway.find_address(token)
        if reply is OK_REPLY:
            envelope.rcpt_tos.append(address)
            envelope.rcpt_options.extend(options)
        return reply.line

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - aiosmtpd's name
        """Handle the content of a mail (DATA): post it to the gateway for each recipient; return the SMTP reply.

        With LMTP the reply has one line per recipient, with SMTP the worst one for all.
        """
        del server, session
        content = envelope.content or b""
        raw = content.encode() if isinstance(content, str) else content
        self._handed_over += 1
        self.at_rest.clear()
        try:
            replies = [await self._hand_off(address, raw, envelope) for address in envelope.rcpt_tos]
        finally:
            self._handed_over -= 1
            if self._handed_over == 0:
                self.at_rest.set()
        for address, reply in zip(envelope.rcpt_tos, replies, strict=True):
            log.info("mail posted", recipient_domain=split_recipient(address)[1], code=reply.code)
        if self._protocol is MailProtocol.LMTP:
            return "\r\n".join(reply.line for reply in replies)
        return worst_reply(replies).line

    async def _hand_off(self, address: str, content: bytes, envelope: Envelope) -> SmtpReply:
        """Post a mail to the trigger of one recipient; return the SMTP reply,
        550 without a trigger token in the address.
        """
        token, _ = split_recipient(address)
        if token is None:
            return NO_SUCH_ADDRESS_REPLY
        sender = envelope.mail_from or ""
        return await self._gateway.hand_off(token, content, sender=sender, recipient=address)


def split_recipient(address: str) -> tuple[str | None, str]:
    """Return trigger token and domain of a recipient such as `name+token@domain`, both in lower case.

    The token is None if the part before the `@` does not end in one.
    """
    local, _, domain = address.strip().removeprefix("<").removesuffix(">").rpartition("@")
    token = local.strip('"').lower().rpartition("+")[2]
    return (token if token.startswith(TOKEN_PREFIX) else None), domain.lower()


def worst_reply(replies: Sequence[SmtpReply]) -> SmtpReply:
    """Return the single SMTP reply to a mail for several recipients: the first 4xx, else the first 5xx, else 250.

    A temporary failure makes the mail server repeat the mail for all recipients; the gateway deduplicates the
    accepted ones.
    """
    passing = [reply for reply in replies if 400 <= reply.code < 500]  # noqa: PLR2004 - as RFC 5321 divides replies
    final = [reply for reply in replies if reply.code >= 500]  # noqa: PLR2004 - as above
    return next(iter([*passing, *final]), OK_REPLY)


class BoundedConnections:
    """Protocol factory that rejects connections beyond a limit."""

    def __init__(self, settings: SmtpListenerSettings, handler: SmtpMailHandler) -> None:
        self._limit = settings.smtp_connections
        self.open = 0
        protocol = _BoundedLmtp if settings.smtp_protocol is MailProtocol.LMTP else _BoundedSmtp
        self._make = partial(
            protocol,
            handler,
            connections=self,
            data_size_limit=settings.smtp_max_bytes,
            hostname=socket.getfqdn(),
            ident=SERVER_NAME,
            tls_context=settings.tls_context(),
            require_starttls=settings.smtp_require_tls,
            timeout=IDLE_SECONDS,
        )

    def __call__(self) -> asyncio.BaseProtocol:
        if self.open >= self._limit:
            return _RejectedConnection()
        protocol: asyncio.BaseProtocol = self._make(loop=asyncio.get_running_loop())
        return protocol


class _RejectedConnection(asyncio.Protocol):
    """Protocol of a connection beyond the limit, which is refused at once."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Answer a connection beyond the limit with a temporary SMTP error, and close it."""
        if isinstance(transport, asyncio.WriteTransport):
            transport.write(TOO_MANY_CONNECTIONS_REPLY)
            transport.close()


class _BoundedSmtp(SMTP):
    """SMTP protocol of aiosmtpd that counts as one open connection from its start to its loss."""

    def __init__(self, handler: SmtpMailHandler, *, connections: BoundedConnections, **settings: Any) -> None:  # noqa: ANN401 - those of aiosmtpd
        super().__init__(handler, **settings)
        self._connections = connections
        self._is_counted = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Count the connection as open at its first call; STARTTLS makes a second one."""
        if not self._is_counted:
            self._is_counted = True
            self._connections.open += 1
        super().connection_made(transport)

    def connection_lost(self, error: Exception | None) -> None:
        """Count the connection as closed."""
        if self._is_counted:
            self._is_counted = False
            self._connections.open -= 1
        super().connection_lost(error)


class _BoundedLmtp(_BoundedSmtp, LMTP):
    """LMTP protocol of aiosmtpd that counts as one open connection from its start to its loss."""


@asynccontextmanager
async def run_listener(settings: SmtpListenerSettings) -> AsyncIterator[asyncio.Server]:
    """Listen for mail until the context ends, then wait up to 20 seconds for mails that are being posted.

    Yields the listening server. Raises `InvalidSettings` for unusable TLS files, and `OSError` for an address
    that can't be bound.
    """
    gateway = MailGateway(settings.url)
    handler = SmtpMailHandler(gateway, settings.smtp_domains, settings.smtp_protocol)
    try:
        connections = BoundedConnections(settings, handler)
        loop = asyncio.get_running_loop()
        server = await loop.create_server(connections, settings.smtp_host, settings.smtp_port)
        try:
            yield server
        finally:
            server.close()
            # A sender repeats a mail whose reply is cut off, and the gateway deduplicates it.
            with suppress(TimeoutError):
                async with asyncio.timeout(SHUTDOWN_SECONDS):
                    await handler.at_rest.wait()
    finally:
        await gateway.close()


def serve(settings: SmtpListenerSettings) -> None:
    """Run the mail listener until SIGTERM or SIGINT; blocks. Raises the errors of `run_listener`."""
    asyncio.run(_serve(settings))


async def _serve(settings: SmtpListenerSettings) -> None:
    """Listen for mail until SIGTERM or SIGINT, and touch the heartbeat file meanwhile, if the settings name one.

    Raises the errors of `run_listener`, and `OSError` if the file can't be touched at first.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(heartbeat.run_heartbeat(settings.heartbeat_file))
        server = await stack.enter_async_context(run_listener(settings))
        host, port = server.sockets[0].getsockname()[:2]
        log.info("SMTP listener ready", host=host, port=port, protocol=settings.smtp_protocol.value)
        await stop.wait()
        log.info("SMTP listener stops")
