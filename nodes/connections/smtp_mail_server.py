"""Mail server of a user, reached at a checked address: each mail uses a connection of its own."""

from __future__ import annotations

import asyncio
import re
import ssl
from base64 import b64encode
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

import aiosmtplib

from concurrency import offload
from engine.run_errors import NodeError
from models.data_source_types import MailTls
from nodes import config_fields, redaction
from nodes.connection_phases import ConnectionPhase, note_phase
from nodes.connections import data_source_policy, database_session
from nodes.tcp_sockets import connect_socket
from nodes.url_targets import MAX_PORT

if TYPE_CHECKING:
    import socket

    from aiosmtplib.response import SMTPResponse

    from nodes.connections.data_source import ConnectionSource
    from nodes.connections.data_source_policy import ConnectionPolicy, ResolveHost
    from nodes.url_targets import IpAddress

ALLOWED_PORTS: Final = frozenset({25, 465, 587})
"""Privileged ports of mail servers."""
CONNECT_SECONDS: Final = 10
PIECE_BYTES: Final = 65_536
CLIENT_NAME: Final = "localhost.localdomain"
"""Name in EHLO: the machine's own name stays secret."""
_TEMPORARY_CODES: Final = range(400, 500)
_BARE_LINE_END: Final = re.compile(rb"\r(?!\n)|(?<!\r)\n")


def open_server(
    source: ConnectionSource, connection_policy: ConnectionPolicy, resolve: ResolveHost
) -> SmtpMailServer:
    """Return the mail server of a data source without connecting; raises `NodeError` for unusable settings."""
    return SmtpMailServer(SmtpEndpoint.from_source(source), connection_policy, resolve)


@dataclass(frozen=True, slots=True)
class SmtpEndpoint:
    """Address and login of a mail server."""

    host: str
    port: int
    tls: MailTls
    username: str
    """Empty disables the login."""
    password: str = field(repr=False)

    @classmethod
    def from_source(cls, source: ConnectionSource) -> Self:
        settings = {"port": 587, "tls": MailTls.STARTTLS.value, "username": "", **source.settings}
        return cls(
            host=config_fields.read_text(settings, "host"),
            port=int(config_fields.read_number(settings, "port", minimum=1, maximum=MAX_PORT)),
            tls=config_fields.read_choice(settings, "tls", MailTls),
            username=config_fields.read_text(settings, "username"),
            password=source.secrets.get("password", ""),
        )

    def login_secrets(self) -> Sequence[str]:
        """Return the password in each form in which a server may repeat it: plain, and in Base64 as the login sends it;
        empty without a password.
        """
        if not self.password:
            return []
        sent = (self.password, f"\0{self.username}\0{self.password}")
        return [self.password, *(b64encode(text.encode()).decode() for text in sent)]


class SmtpMailServer:
    """Implements `engine.services.MailServerService`."""

    def __init__(
        self, place: SmtpEndpoint, connection_policy: ConnectionPolicy, resolve: ResolveHost
    ) -> None:
        self._place = place
        self._policy = connection_policy
        self._resolve = resolve

    @property
    def login_name(self) -> str:
        """User name of the login; empty without one."""
        return self._place.username

    async def send(
        self, sender: str, recipients: Sequence[str], message: bytes, *, timeout_seconds: float
    ) -> None:
        """Send one mail to all recipients over SMTP; if a recipient is refused, nobody gets it.

        Raises `NodeError` if the server refuses anything, and at the time limit; with the code `delivery-unknown` if
        the connection is lost after the whole content was sent, but before the server confirms it.
        """
        written = await offload.run_in_thread(_stuff_dots, message)
        async with self._session(timeout_seconds) as client:
            _check_size(client, len(message))
            with _translate_refusal("sender-refused", f"the sender {sender}"):
                await client.mail(sender)
            for each in recipients:
                # A refused recipient ends the mail before its content is sent: a second attempt never reaches anybody
                # twice.
                with _translate_refusal("recipient-refused", f"the recipient {each}"):
                    await client.rcpt(each)
            await _send_content(client, written)

    async def check(self, *, timeout_seconds: float) -> None:
        """Connect and log in as for a mail, without sending one, to test a data source.

        Raises `NodeError` if that fails or exceeds the time limit.
        """
        async with self._session(timeout_seconds):
            pass

    @asynccontextmanager
    async def _session(self, timeout_seconds: float) -> AsyncIterator[aiosmtplib.SMTP]:
        """Yield a connection with TLS and login done; close it at the end.

        Failures and the time limit, which includes the block, raise `NodeError` with the login's secrets
        redacted.
        """
        client: aiosmtplib.SMTP | None = None
        try:
            with redaction.redact_errors(self._place.login_secrets()), _translate_errors(timeout_seconds):
                async with asyncio.timeout(timeout_seconds):
                    client = await self._connect()
                    if self._place.tls is MailTls.STARTTLS:
                        with note_phase(ConnectionPhase.TLS):
                            await self._start_tls(client)
                    with note_phase(ConnectionPhase.AUTH):
                        await self._log_in(client)
                    yield client
            _quit(client)
        finally:
            if client is not None:
                client.close()

    async def _connect(self) -> aiosmtplib.SMTP:
        """Connect to the first of the host's addresses that accepts a connection, and return it after the server's
        greeting.

        Raises `NodeError` if one of the addresses is not permitted, none accepts, or the greeting is negative.
        """
        place = self._place
        found = await data_source_policy.resolve_allowed(
            self._policy,
            self._resolve,
            host=place.host,
            port=place.port,
            database="",
            privileged_ports=ALLOWED_PORTS,
        )
        context = (
            None if place.tls is MailTls.NONE else await offload.run_in_thread(ssl.create_default_context)
        )
        with note_phase(ConnectionPhase.TCP):
            opened = await _open_socket(found, place.port)
        client = aiosmtplib.SMTP(
            hostname=place.host,  # The certificate must have this name.
            sock=opened,
            use_tls=place.tls is MailTls.TLS,
            start_tls=False,
            tls_context=context,
            local_hostname=CLIENT_NAME,
            timeout=None,
        )
        # The answer is the server's greeting.
        greeted = ConnectionPhase.TLS if place.tls is MailTls.TLS else ConnectionPhase.AUTH
        with _translate_refusal("connection-failed", "the connection"), note_phase(greeted):
            await client.connect()
        return client

    async def _start_tls(self, client: aiosmtplib.SMTP) -> None:
        """Begin TLS by STARTTLS; raises `NodeError` if the server doesn't offer it or fails."""
        with _translate_refusal("connection-failed", "EHLO"):
            await client.ehlo()
        if not client.supports_extension("starttls"):
            message = "The mail server offers no STARTTLS, or an attacker suppresses it: nothing was sent"
            raise NodeError(message, code="tls-failed")
        with _translate_refusal("tls-failed", "STARTTLS"):
            await client.starttls()

    async def _log_in(self, client: aiosmtplib.SMTP) -> None:
        with _translate_refusal("connection-failed", "EHLO"):
            await client.ehlo()
        if not self._place.username:
            return
        if not client.supported_auth_methods:
            raise NodeError("The mail server offers no supported login method", code="login-refused")
        try:
            await client.login(self._place.username, self._place.password)
        except aiosmtplib.SMTPResponseException as error:
            # Without the server's text: some servers repeat the credentials.
            message = f"The mail server refused the login ({error.code})"
            raise NodeError(
                message, code="login-refused", retryable=error.code in _TEMPORARY_CODES
            ) from error


# ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────


async def _open_socket(addresses: Sequence[IpAddress], port: int) -> socket.socket:
    reason = "the server did not answer"
    for address in addresses:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                return await connect_socket(address, port)
        except TimeoutError:
            reason = f"there was no answer within {CONNECT_SECONDS} s"
        except OSError:
            continue
    raise _connection_error(reason)


def _check_size(client: aiosmtplib.SMTP, size: int) -> None:
    most = client.esmtp_extensions.get("size", "")
    if most.isdecimal() and 0 < int(most) < size:
        message = f"The mail has {size:,} bytes, and the mail server accepts {int(most):,}"
        raise NodeError(message, code="mail-too-large")


def _stuff_dots(message: bytes) -> bytes:
    """Return a mail as SMTP sends it: line ends normalized, leading dots doubled, and the final dot (RFC
    5321, 4.5.2).
    """
    if not message.count(b"\r\n") == message.count(b"\r") == message.count(b"\n"):
        message = _BARE_LINE_END.sub(b"\r\n", message)
    first = b"." if message.startswith(b".") else b""
    last = b"" if message.endswith(b"\r\n") else b"\r\n"
    return b"".join((first, message.replace(b"\r\n.", b"\r\n.."), last, b".\r\n"))


async def _send_content(client: aiosmtplib.SMTP, written: bytes) -> None:
    """Send a mail of `_stuff_dots` in pieces with flow control, and wait for the server's confirmation.

    Raises `NodeError`: with the retryable code `delivery-unknown` if the connection is lost after the last piece,
    before the confirmation. A loss before raises `OSError` or `SMTPServerDisconnected`.
    """
    with _translate_refusal("mail-refused", "the mail"):
        _require_code(await client.execute_command(b"DATA"), 354)
        protocol = client.protocol
        if protocol is None:
            raise _connection_error("it was lost")
        last = (len(written) - 1) // PIECE_BYTES * PIECE_BYTES
        for begin in range(0, last, PIECE_BYTES):
            protocol.write(written[begin : begin + PIECE_BYTES])
            await protocol._drain_helper()  # noqa: SLF001 - asyncio's own writer waits for it too
        # The reply is awaited from here on: nothing may come between, or it could be missed.
        protocol.write(written[last:])
        try:
            answer = await protocol.read_response()
        except (aiosmtplib.SMTPServerDisconnected, OSError) as error:
            message = "The connection was lost before the mail server confirmed the mail"
            raise NodeError(message, code="delivery-unknown", retryable=True) from error
        _require_code(answer, 250)


def _quit(client: aiosmtplib.SMTP) -> None:
    """Send QUIT without waiting for the reply, since a slow server has accepted the mail all the same."""
    if client.protocol is not None:
        with suppress(aiosmtplib.SMTPServerDisconnected):
            client.protocol.write(b"QUIT\r\n")


def _require_code(answer: SMTPResponse, code: int) -> None:
    if answer.code != code:
        raise aiosmtplib.SMTPResponseException(answer.code, answer.message)


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _translate_refusal(code: str, what: str) -> Iterator[None]:
    """Translate a negative SMTP reply within the block to a `NodeError` with `code`, retryable for temporary ones.

    `what` names the refused part in the message, which quotes the server's text.
    """
    try:
        yield
    except aiosmtplib.SMTPResponseException as error:
        if error.code < 0:
            raise _connection_error("the server is not a mail server", retryable=False) from error
        message = f"The mail server refused {what}: {error.code} {database_session.quote_server_message(error.message)}"
        raise NodeError(message, code=code, retryable=error.code in _TEMPORARY_CODES) from error


@contextmanager
def _translate_errors(timeout_seconds: float) -> Iterator[None]:
    """Translate failures of the block other than negative replies to `NodeError`, also its timeout."""
    try:
        yield
    except ssl.SSLError as error:
        message = "The mail server's certificate is not trusted, or it does not support TLS"
        raise NodeError(message, code="tls-failed") from error
    except TimeoutError as error:
        message = f"The mail server did not finish within {timeout_seconds:g} s, which is the limit (`timeoutSeconds`)"
        raise NodeError(message, code="timeout", retryable=True) from error
    except OSError as error:
        if isinstance(error.__cause__, ssl.SSLError):
            message = "The mail server's certificate is not trusted, or it does not support TLS"
            raise NodeError(message, code="tls-failed") from error
        raise _connection_error("it was lost") from error
    except (aiosmtplib.SMTPException, ValueError) as error:
        raise _connection_error(database_session.quote_server_message(error)) from error


def _connection_error(reason: str, *, retryable: bool = True) -> NodeError:
    return NodeError(
        f"No connection to the mail server: {reason}", code="connection-failed", retryable=retryable
    )
