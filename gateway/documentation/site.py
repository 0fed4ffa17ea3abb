"""Serve the documentation below `/docs/`: the site that `make docs` builds, else the Markdown pages of a checkout.

Only listed files are served: a manifest names those of the site. No path of a request ever reaches the file system.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct, field

from gateway.documentation import plain_pages
from gateway.http import errors
from gateway.http.cached_text import CachedText, RedirectResponse
from json_text.decoding import build_decoder

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from gateway.http.request import GatewayRequest

PREFIX: Final = "/docs/"
BUILT: Final = Path(__file__).parent / "built"
"""The site, which Git ignores and the wheel contains."""
CHECKOUT: Final = Path(__file__).parents[2]
MANIFEST: Final = "manifest.json"
INDEX: Final = "index.html"

_CONTENT_TYPES: Final[Mapping[str, str]] = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
    ".webp": "image/webp",
    ".woff2": "font/woff2",
}
_OTHER_TYPE: Final = "text/plain; charset=utf-8"
_NO_SCRIPTS: Final = "default-src 'none'; frame-ancestors 'none'"
"""The policy of files that are no pages: an SVG image can have scripts too."""


class SiteFile(msgspec.Struct, frozen=True):
    """An entry of the manifest: `digest` is a SHA-256 in hexadecimal, cut; `policy` is a Content-Security-Policy."""

    digest: str
    policy: str = _NO_SCRIPTS


class DocumentationSite(Struct, frozen=True):
    """A folder with a built site, and its files by their paths below `/docs/`."""

    folder: Path
    files: Mapping[str, SiteFile] = field(default_factory=dict)

    def find(self, path: str) -> ASGIApp | None:
        """Return the answer with the file at a path below `/docs/`; a folder's is its `index.html`.

        A folder without a slash at the end is redirected to one. None for other paths.
        """
        name = path + INDEX if path.endswith("/") or not path else path
        entry = self.files.get(name)
        if entry is not None:
            return self._answer(name, entry)
        if f"{path}/{INDEX}" in self.files:
            return RedirectResponse(f"{path.rpartition('/')[2]}/")
        return None

    def _answer(self, name: str, entry: SiteFile) -> CachedText:
        content_type = _CONTENT_TYPES.get(Path(name).suffix, _OTHER_TYPE)
        return CachedText(
            (self.folder / name).read_bytes(),
            b'"%s"' % entry.digest.encode(),
            (
                (b"content-type", content_type.encode()),
                (b"content-security-policy", entry.policy.encode()),
                (b"referrer-policy", b"no-referrer"),
            ),
        )


def open_site(folder: Path, *, checkout: Path) -> DocumentationSite | plain_pages.PlainPages:
    """Return the built site in `folder`; if none was built, the Markdown pages of the checkout, of which
    there may be none.
    """
    manifest = folder / MANIFEST
    if manifest.exists():
        files = build_decoder(dict[str, SiteFile]).decode(manifest.read_bytes())
        return DocumentationSite(folder, files)
    return plain_pages.find_pages(checkout)


async def show(request: GatewayRequest) -> ASGIApp:
    """Show a page or file of the documentation."""
    found = await asyncio.to_thread(_find, request.scope["path"].removeprefix(PREFIX))
    if found is None:
        raise errors.not_found("page")
    return found


async def redirect(request: GatewayRequest) -> RedirectResponse:  # noqa: ARG001 - a handler's signature
    """Redirect to the documentation, by a relative address, which stays below the path of a proxy."""
    return RedirectResponse("docs/")


def _find(path: str) -> ASGIApp | None:
    """Return the answer for a path of the documentation, None for unknown ones; a rebuilt site is opened again.

    It reads files, so it runs in a thread.
    """
    try:
        built_at = (BUILT / MANIFEST).stat().st_mtime_ns
    except FileNotFoundError:
        built_at = 0
    return _open_built_site(built_at).find(path)


@lru_cache(maxsize=1)
def _open_built_site(built_at: int) -> DocumentationSite | plain_pages.PlainPages:  # noqa: ARG001 - a new build is opened anew
    return open_site(BUILT, checkout=CHECKOUT)
