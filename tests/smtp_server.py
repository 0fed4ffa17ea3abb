"""Mail server for tests with configurable replies; it stores every mail that it accepts."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session

USERNAME, PASSWORD = "ada", "canary-of-ada"


@dataclass
class ReceivedMail:
    sender: str
    recipients: list[str]
    content: bytes
    was_encrypted: bool
    was_logged_in: bool


@dataclass
class FakeMailServer:
    """State of the mail server: received mails, and configured replies."""

    port: int = 0
    received: list[ReceivedMail] = field(default_factory=list)
    logins: list[tuple[str, str, bool]] = field(default_factory=list)
    """Username, password, and whether the way was encrypted."""
    answers: dict[str, str] = field(default_factory=dict)
    """To the recipient of that name, or to `DATA`, where it isn't 250."""
    breaks_after_data: bool = False
    leaves_nobody: bool = False
    """It never answers a goodbye."""

    def authenticate(
        self, _server: object, session: Session, _envelope: object, _mechanism: str, data: object
    ) -> AuthResult:
        """Record a login, and accept it if it has the right name and password; aiosmtpd calls it."""
        assert isinstance(data, LoginPassword)
        username, password = data.login.decode(), data.password.decode()
        self.logins.append((username, password, session.ssl is not None))
        return AuthResult(success=(username, password) == (USERNAME, PASSWORD), handled=False)

    # ── as a handler ──────────────────────────────────────────────────────────────────────────────────────

    async def handle_RCPT(  # noqa: N802 - the library's own name
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        """Answer a recipient as configured, and keep it if it is accepted."""
        answer = self.answers.get(address, "250 OK")
        if answer.startswith("250"):
            envelope.rcpt_tos.append(address)
        return answer

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802 - as above
        """Answer a mail as configured, store it if it is accepted, and break the connection if asked to."""
        answer = self.answers.get("DATA", "250 OK")
        content = envelope.content
        assert isinstance(content, bytes)
        if answer.startswith("250"):
            self.received.append(
                ReceivedMail(
                    str(envelope.mail_from),
                    list(envelope.rcpt_tos),
                    content,
                    was_encrypted=session.ssl is not None,
                    was_logged_in=bool(session.authenticated),
                )
            )
        if self.breaks_after_data:
            assert server.transport is not None
            server.transport.close()
        return answer

    async def handle_QUIT(self, _server: SMTP, _session: Session, _envelope: Envelope) -> str:  # noqa: N802 - as above
        if self.leaves_nobody:
            await asyncio.Event().wait()
        return "221 Bye"


@asynccontextmanager
async def serve_smtp(
    certificate: Path | None = None, *, tls: str = "starttls"
) -> AsyncIterator[FakeMailServer]:
    """Serve a mail server on a free port of the loopback during the block.

    `tls` has the values of data sources: `starttls`, `tls` or another for none; it needs a certificate.
    """
    mail_server = FakeMailServer()
    context = _tls_context(certificate) if certificate else None

    def protocol() -> SMTP:
        return SMTP(
            mail_server,
            hostname="mail.example",
            tls_context=context if tls == "starttls" else None,
            authenticator=mail_server.authenticate,
            auth_require_tls=tls == "starttls",
            auth_required=tls == "starttls",
        )

    loop = asyncio.get_running_loop()
    server = await loop.create_server(protocol, "127.0.0.1", 0, ssl=context if tls == "tls" else None)
    mail_server.port = server.sockets[0].getsockname()[1]
    try:
        yield mail_server
    finally:
        server.close()


def _tls_context(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context
