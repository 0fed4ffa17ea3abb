"""Placeholders of approval links: expressions give them, and nodes that send requests replace them at the last moment.

So neither spans nor recorded requests, logs or outputs contain a link. Their host never resolves (RFC 2606).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

if TYPE_CHECKING:
    from engine.graph import GraphNode
    from engine.values import Json

APPROVAL_TYPE: Final = "human-input"
_HOST: Final = "https://approval.invalid/"
_PLACEHOLDER: Final = re.compile(r"https://approval\.invalid/([A-Za-z0-9_-]{1,64})(?:/([0-9][0-9.]{0,199}))?")

Place = tuple[str, str]
"""Id and iteration of a node that asks."""


def build_root(nodes: Iterable[GraphNode], iteration: str = "") -> dict[str, Json]:
    """Return the value of the expression root `approval`: `url` for each node that asks a person, by node id.

    The URLs are placeholders, which name node and iteration; they are replaced by links when a node uses
    them.
    """
    suffix = f"/{iteration}" if iteration else ""
    return {node.id: {"url": f"{_HOST}{node.id}{suffix}"} for node in nodes if node.type == APPROVAL_TYPE}


def find_places(texts: Iterable[str]) -> Collection[Place]:
    """Return node id and iteration of each placeholder of a link in the texts, once; percent-encoded ones are
    found too.
    """
    found: dict[Place, None] = {}
    for text in texts:
        plain = text.replace("%3A", ":").replace("%2F", "/") if "approval.invalid%2F" in text else text
        found |= dict.fromkeys((one[1], one[2] or "") for one in _PLACEHOLDER.finditer(plain))
    return found.keys()


def replace_places(text: str, links: Mapping[Place, str]) -> str:
    """Return a text with the links, by node id and iteration, in place of their placeholders; unknown ones stay.

    A percent-encoded placeholder is replaced by an encoded link.
    """

    def link(found: re.Match[str]) -> str:
        return links.get((found[1], found[2] or ""), found[0])

    for (node_id, iteration), url in links.items():
        encoded = quote(f"{_HOST}{node_id}" + (f"/{iteration}" if iteration else ""), safe="")
        text = text.replace(encoded, quote(url, safe=""))
    return _PLACEHOLDER.sub(link, text)
