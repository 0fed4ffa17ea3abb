"""The Markdown pages of a checkout, shown as they are with their links: for a gateway without the built site."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Final

from msgspec import Struct

from gateway.http.cached_text import CachedText

if TYPE_CHECKING:
    from starlette.types import ASGIApp

POLICY: Final = (
    "default-src 'none'; img-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
CONTENTS: Final = "README.md"

_LINK: Final = re.compile(r"\[([^\]\n]+)\]\(([^)\s]+)\)")
_NO_PAGES: Final = "This installation was built without its documentation."
_NO_VIEWER: Final = "`make docs` builds the documentation site, with search and a viewer of the API."


class PlainPages(Struct, frozen=True):
    """Markdown pages by their paths below `/docs/`; without any, the contents lead to the API's document alone."""

    pages: Mapping[str, Path]

    def find(self, path: str) -> ASGIApp | None:
        """Return the answer with the Markdown page at a path below `/docs/`, `README.md` for "".

        `api`, which only the built site has, and `README.md` without a checkout, are short explanations. None for
        other paths.
        """
        name = path or CONTENTS
        if name in self.pages:
            return _build_answer(name, self._render_markdown(name))
        if name == CONTENTS:
            return _build_answer(name, escape(_NO_PAGES))
        if name in {"api", "api/"}:
            return _build_answer(name, escape(_NO_VIEWER))
        return None

    def _render_markdown(self, name: str) -> str:
        """Return the text of a page as escaped HTML in which links to other served pages work; other links
        stay text.
        """

        def link(match: re.Match[str]) -> str:
            target = posixpath.normpath(posixpath.join(posixpath.dirname(name), match[2].partition("#")[0]))
            if target not in self.pages:
                return match[0]
            return f'[{match[1]}](<a href="{match[2]}">{match[2]}</a>)'

        return _LINK.sub(link, escape(self.pages[name].read_text()))


def find_pages(checkout: Path) -> PlainPages:
    """Return the Markdown pages of a checkout; none if the folder is no checkout, such as `site-packages`."""
    docs = checkout / "docs"
    if not (checkout / "pyproject.toml").exists():
        return PlainPages({})
    return PlainPages({path.relative_to(docs).as_posix(): path for path in docs.glob("**/*.md")})


def _build_answer(name: str, text: str) -> CachedText:
    """Return the answer with a page of escaped text, below links to the contents and the API's document."""
    up = "../" * name.count("/")
    body = (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(name)}</title>"
        f'<link rel=icon href="{up}../favicon.svg" type="image/svg+xml">'
        f'<p><a href="{up or "./"}">Contents</a> · <a href="{up}../openapi.json">openapi.json</a></p>'
        f"<pre>{text}</pre></html>"
    ).encode()
    return CachedText(
        body,
        b'"%s"' % sha256(body).hexdigest()[:32].encode(),
        (
            (b"content-type", b"text/html; charset=utf-8"),
            (b"content-security-policy", POLICY.encode()),
            (b"referrer-policy", b"no-referrer"),
        ),
    )
