"""Client of the gateway's mail endpoint that translates its responses to SMTP replies."""

from __future__ import annotations

from io import BytesIO
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import aiohttp
import msgspec
import structlog
from msgspec import Struct

from bridge.http_bodies import read_body
from json_text import decoding

if TYPE_CHECKING:
    from collections.abc import Mapping

log = structlog.get_logger()

CALL_SECONDS: Final = 60.0
CONNECT_SECONDS: Final = 5.0
MAX_ANSWER_BYTES: Final = 1_000_000
MAX_MESSAGE_CHARACTERS: Final = 200
SUCCESS_STATUSES: Final = range(200, 300)
NOT_FOUND_STATUS: Final = 404
TOO_LARGE_STATUS: Final = 413
FINAL_STATUSES: Final = frozenset({400, 401, 403, 415, 422})
"""Statuses that the same mail would get again; other failures may be temporary."""


class SmtpReply(Struct, frozen=True):
    """SMTP reply: a code and a text that begins with an enhanced status code (RFC 3463)."""

    code: int
    text: str

    @property
    def line(self) -> str:
        """The reply as one line of SMTP: its code and its text."""
        return f"{self.code} {self.text}"


OK_REPLY: Final = SmtpReply(250, "2.1.5 OK")
NO_SUCH_ADDRESS_REPLY: Final = SmtpReply(550, "5.1.1 No workflow accepts mail at this address")
RETRY_LATER_REPLY: Final = SmtpReply(451, "4.3.0 The workflow server can't be reached: try again later")


class _MailRefusalDetail(msgspec.Struct):
    code: str = ""
    message: str = ""


class _MailRefusal(msgspec.Struct):
    error: _MailRefusalDetail


class MailGateway:
    """Posts mails over HTTP to the addresses of e-mail triggers."""

    def __init__(self, url: str) -> None:
        self._base = f"{url.rstrip('/')}/mail/"
        timeout = aiohttp.ClientTimeout(total=CALL_SECONDS, sock_connect=CONNECT_SECONDS)
        self._session = aiohttp.ClientSession(timeout=timeout, trust_env=False)

    async def find_address(self, token: str) -> SmtpReply:
        """Ask the gateway whether the address of a trigger token accepts mail; return the SMTP reply.

        250 if it does, 4xx if the gateway can't be reached (the sender tries again later), 5xx for an unknown address.
        Raises only `BridgeRefused`, for an answer that is too large.
        """
        return await self._ask("GET", token, {}, None)

    async def hand_off(self, token: str, content: bytes, *, sender: str, recipient: str) -> SmtpReply:
        """Post a raw mail (RFC 5322) to the address of a trigger token; return the SMTP reply.

        `sender` and `recipient` are those of its envelope. The reply is 250 once the mail's runs are committed, else
        4xx (send it again) or 5xx (refused for good). The call may take up to 60 seconds. Raises only `BridgeRefused`,
        for an answer that is too large.
        """
        headers = {
            "Content-Type": "message/rfc822",
            "X-Envelope-From": _encode_address(sender),
            "X-Envelope-To": _encode_address(recipient),
        }
        return await self._ask("POST", token, headers, content)

    async def close(self) -> None:
        """Close the connections to the gateway; the object can't be used afterwards."""
        await self._session.close()

    async def _ask(
        self, method: str, token: str, headers: Mapping[str, str], content: bytes | None
    ) -> SmtpReply:
        """Send a request about a trigger token to the gateway, with a raw mail or None; return the SMTP reply.

        An unreachable gateway gives a temporary reply (4xx) and is logged. Raises `BridgeRefused` for an answer that is
        too large.
        """
        url = self._base + quote(token, safe="")
        data = None if content is None else BytesIO(content)
        try:
            async with self._session.request(
                method, url, data=data, headers=headers, allow_redirects=False
            ) as response:
                return _reply_for_status(response.status, await read_body(response, MAX_ANSWER_BYTES))
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            log.warning("gateway not reached", error=str(error) or type(error).__name__)
            return RETRY_LATER_REPLY


def _reply_for_status(status: int, text: bytes) -> SmtpReply:
    """Return the SMTP reply for the HTTP status and body of the gateway's answer.

    A status of 2xx gives 250. 404 gives 5xx, and so does every other status that a repetition can't help, if the body
    is an error of the gateway. All others give 4xx, after which the sender tries again.
    """
    if status in SUCCESS_STATUSES:
        return OK_REPLY
    if status == NOT_FOUND_STATUS:
        return NO_SUCH_ADDRESS_REPLY
    try:
        reason = decoding.decode(text, _MailRefusal).error
    except msgspec.DecodeError:
        return RETRY_LATER_REPLY
    reason_text = "".join(one for one in f"{reason.code}: {reason.message}" if " " <= one <= "~")[
        :MAX_MESSAGE_CHARACTERS
    ]
    if status == TOO_LARGE_STATUS:
        return SmtpReply(552, f"5.3.4 {reason_text}")
    return (
        SmtpReply(550, f"5.7.1 {reason_text}")
        if status in FINAL_STATUSES
        else SmtpReply(451, f"4.3.0 {reason_text}")
    )


def _encode_address(address: str) -> str:
    """Return the visible ASCII characters of an address and drop all others.

    aiohttp refuses line ends in headers, and SMTPUTF8 is not offered.
    """
    return "".join(one for one in address if " " < one <= "~")
