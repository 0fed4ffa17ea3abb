"""Blob download as an ASGI answer, sent in pieces and never rendered as a page of this server."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from journal.blobs.blob_store import RAW_MEDIA_TYPE

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from journal.blobs.blob_storage import BlobOwner, OpenBlob
    from journal.blobs.blob_store import BlobStore

SANDBOXED: Final = (b"content-security-policy", b"sandbox; default-src 'none'")
"""Users write the content: a browser that displays it anyway must not execute it."""


class BlobDownload:
    """Download of one blob, closed after it was sent."""

    def __init__(self, opened: OpenBlob, sha256: str, closing: AsyncExitStack) -> None:
        self._opened = opened
        self._sha256 = sha256
        self._closing = closing

    @classmethod
    async def of(cls, blobs: BlobStore, owner: BlobOwner, sha256: str) -> BlobDownload:
        """Open a blob and return its download as an answer, which closes it when sent; an answer that is not sent keeps
        it open.

        Raises `BlobLost` for a missing one and `BlobsUnavailable` if the storage does not answer.
        """
        async with AsyncExitStack() as stack:
            opened = await stack.enter_async_context(blobs.open(owner, sha256))
            return cls(opened, sha256, stack.pop_all())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        async with self._closing:
            await send({"type": "http.response.start", "status": 200, "headers": self._headers()})
            if scope["method"] != "HEAD":
                # If the last piece is corrupt, the answer stays shorter than declared.
                async for chunk in self._opened.chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    def _headers(self) -> list[tuple[bytes, bytes]]:
        label = self._opened.label
        name = f"; filename*=UTF-8''{quote(label.name, safe='')}" if label.name else ""
        return [
            (b"content-type", (label.type or RAW_MEDIA_TYPE).encode()),
            (b"content-length", b"%d" % self._opened.size),
            (b"content-disposition", f"attachment{name}".encode()),
            (b"etag", f'"{self._sha256}"'.encode()),
            SANDBOXED,
        ]
