"""The gateway as the SMTP listener sees it: does an address take mail, and is a mail taken."""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import aiohttp
import msgspec
import structlog

from bridge.answers import whole
from json_text import decoding

if TYPE_CHECKING:
    from collections.abc import Mapping

log = structlog.get_logger()

CALL_SECONDS: Final = 60.0
CONNECT_SECONDS: Final = 5.0
MAX_ANSWER_BYTES: Final = 1_000_000
MAX_MESSAGE_CHARACTERS: Final = 200
SUCCESS: Final = range(200, 300)
NOT_FOUND: Final = 404
TOO_LARGE: Final = 413
FINAL: Final = frozenset({400, 401, 403, 415, 422})
"""Statuses that the same mail would get again; whatever else is no success may pass."""


@dataclass(frozen=True, slots=True)
class SmtpReply:
    """An answer to a mail server."""

    code: int
    text: str

    @property
    def line(self) -> str:
        return f"{self.code} {self.text}"


OK: Final = SmtpReply(250, "2.1.5 OK")
NO_SUCH_ADDRESS: Final = SmtpReply(550, "5.1.1 No workflow takes mail at this address")
LATER: Final = SmtpReply(451, "4.3.0 The workflow server is not reached: try again later")


class _Reason(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Refusal(msgspec.Struct):
    error: _Reason


class MailGateway:
    """Hands mails over HTTP to the addresses of e-mail triggers."""

    def __init__(self, url: str) -> None:
        self._base = f"{url.rstrip('/')}/mail/"
        timeout = aiohttp.ClientTimeout(total=CALL_SECONDS, sock_connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(timeout=timeout, trust_env=False)

    async def find_address(self, token: str) -> SmtpReply:
        """Return whether an address takes mail; never raises."""
        return await self._ask("GET", token, {}, None)

    async def hand_over(self, token: str, content: bytes, *, sender: str, recipient: str) -> SmtpReply:
        """Return 250 once the mail's run is committed, else what its sender is to do; never raises."""
        headers = {
            "Content-Type": "message/rfc822",
            "X-Envelope-From": _header_value(sender),
            "X-Envelope-To": _header_value(recipient),
        }
        return await self._ask("POST", token, headers, content)

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def _ask(
        self, method: str, token: str, headers: Mapping[str, str], content: bytes | None
    ) -> SmtpReply:
        url = self._base + quote(token, safe="")
        data = None if content is None else BytesIO(content)
        try:
            async with self._session.request(
                method, url, data=data, headers=headers, allow_redirects=False
            ) as response:
                return _reply(response.status, await whole(response, MAX_ANSWER_BYTES))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("gateway not reached", error=str(error) or type(error).__name__)
            return LATER


def _reply(status: int, text: bytes) -> SmtpReply:
    if status in SUCCESS:
        return OK
    if status == NOT_FOUND:
        return NO_SUCH_ADDRESS
    try:
        reason = decoding.decode(text, _Refusal).error
    except msgspec.DecodeError:
        return LATER
    told = "".join(one for one in f"{reason.code}: {reason.message}" if " " <= one <= "~")[
        :MAX_MESSAGE_CHARACTERS
    ]
    if status == TOO_LARGE:
        return SmtpReply(552, f"5.3.4 {told}")
    return SmtpReply(550, f"5.7.1 {told}") if status in FINAL else SmtpReply(451, f"4.3.0 {told}")


def _header_value(address: str) -> str:
    """Return an address as a header holds it; aiohttp refuses line ends, and SMTPUTF8 is not offered."""
    return "".join(one for one in address if " " < one <= "~")
