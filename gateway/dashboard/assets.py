"""Scripts, styles and icons of the dashboard: files of this package, read once, compressed once, cached for good.

All lie below one path with the hash of all of them, so that modules import each other by relative names.
"""

from __future__ import annotations

import gzip
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from gateway.http import errors

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from gateway.http.request import GatewayRequest

FOLDER: Final = Path(__file__).parent / "assets"
PREFIX: Final = "/dashboard/assets/"
CONTENT_TYPES: Final = {
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
_IMMUTABLE: Final = b"public, max-age=31536000, immutable"
_POLICY: Final = b"default-src 'none'; frame-ancestors 'none'"
"""Policy of the files themselves: an SVG image can have scripts too."""


class AssetFile(Struct, frozen=True):
    """File with its content, plain and compressed."""

    content_type: bytes
    plain: bytes
    compressed: bytes


class AssetAnswer(Struct, frozen=True):
    """Answer with a file, as an ASGI response."""

    file: AssetFile
    is_current: bool
    """Whether the requested path has the hash of the present files; other paths must not be cached."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: ARG002 - ASGI's signature
        takes_gzip = any(name == b"accept-encoding" and b"gzip" in value for name, value in scope["headers"])
        body = self.file.compressed if takes_gzip else self.file.plain
        headers = [
            (b"content-type", self.file.content_type),
            (b"content-length", b"%d" % len(body)),
            (b"cache-control", _IMMUTABLE if self.is_current else b"no-store"),
            (b"content-security-policy", _POLICY),
            (b"vary", b"Accept-Encoding"),
            *([(b"content-encoding", b"gzip")] if takes_gzip else []),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


@cache
def read_files() -> dict[str, AssetFile]:
    """Return the files of the dashboard by name, each plain and compressed with gzip; read once per process."""
    files = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in CONTENT_TYPES:
            content = path.read_bytes()
            compressed = gzip.compress(content, 9, mtime=0)
            files[path.name] = AssetFile(CONTENT_TYPES[path.suffix], content, compressed)
    return files


@cache
def version() -> str:
    """Return 16 hexadecimal digits that change with any file of the dashboard, as a part of the addresses of
    its files.
    """
    digest = sha256()
    for name, file in read_files().items():
        digest.update(name.encode() + b"\0" + file.plain)
    return digest.hexdigest()[:16]


async def show(request: GatewayRequest) -> ASGIApp:
    """Show a file of the dashboard."""
    found, _, name = request.scope["path"].removeprefix(PREFIX).partition("/")
    file = read_files().get(name)
    if file is None or request.gateway.settings.dashboard == "off":
        raise errors.not_found("file")
    # Pages of a newer or older process get the file that this process has.
    return AssetAnswer(file, is_current=found == version())
