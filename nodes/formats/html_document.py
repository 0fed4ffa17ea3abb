"""HTML page as a flat list of elements, parsed in pieces and in linear time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lxml import etree
from msgspec import Struct, field

from engine.run_errors import NodeError

if TYPE_CHECKING:
    from concurrency.loop_share import LoopShare

CHUNK_CHARACTERS = 8_192
MAXIMUM_CHARACTERS = 3_000_000
MAXIMUM_ELEMENTS = 100_000
MAXIMUM_ATTRIBUTES = 300_000
MAXIMUM_DEPTH = 200
USUAL_CHARACTERS = 1_000
"""Usual length of the attributes of an element."""
SILENT_TAGS = frozenset({"script", "style", "template", "noscript"})
"""Elements whose text is not displayed."""
INLINE_TAGS = frozenset(
    {
        *(
            "a",
            "abbr",
            "acronym",
            "b",
            "bdi",
            "bdo",
            "big",
            "cite",
            "code",
            "data",
            "del",
            "dfn",
            "em",
            "font",
        ),
        *("i", "ins", "kbd", "label", "mark", "q", "s", "samp", "small", "span", "strike", "strong", "sub"),
        *("sup", "time", "tt", "u", "var", "wbr"),
    }
)
"""Inline elements, which don't separate words; all others do."""


class HtmlElement(Struct):
    """Element; its descendants follow it in the document's list, up to `end`."""

    tag: str
    attributes: Mapping[str, str]
    parent: HtmlElement | None
    depth: int
    place: int
    """Position among the elements of its parent, from 1."""
    position: int
    """Position in the list of all elements."""
    end: int
    text_begin: int
    text_end: int
    classes: frozenset[str] = frozenset()
    weight: int = 1
    """Cost of a test of the element, as a multiple of the usual one."""
    children: int = 0

    @property
    def place_from_end(self) -> int:
        return self.parent.children - self.place + 1 if self.parent else 1


class HtmlDocument(Struct):
    """Page: its elements in order, and all of its text in pieces."""

    elements: list[HtmlElement] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)

    def list_descendants(self, element: HtmlElement) -> list[HtmlElement]:
        return self.elements[element.position + 1 : element.end]

    def text(self, element: HtmlElement) -> str:
        """Return the text of an element and its descendants, without scripts and styles.

        White space is kept, and a space is added around each block element.
        """
        return "".join(self.texts[element.text_begin : element.text_end])


async def read_document(html: str, turn: LoopShare) -> HtmlDocument:
    """Parse a page, repairing malformed HTML.

    It lets other tasks run. Raises `NodeError` for over three million characters, too many elements or attributes, and
    nesting over 200 deep.
    """
    if len(html) > MAXIMUM_CHARACTERS:
        message = f"`html` has {len(html):,} characters; at most {MAXIMUM_CHARACTERS:,} are read"
        raise NodeError(message, code="input-too-large")
    builder = DocumentBuilder()
    parser = etree.HTMLParser(target=builder, no_network=True, huge_tree=False)
    for begin in range(0, len(html), CHUNK_CHARACTERS):
        parser.feed(html[begin : begin + CHUNK_CHARACTERS])
        await turn.yield_if_due()
    if html.strip():
        parser.close()
    return builder.document


class DocumentBuilder:
    """Target of the parser that builds the document."""

    def __init__(self) -> None:
        self.document = HtmlDocument()
        self._open: list[HtmlElement] = []
        self._tops = 0
        self._attributes = 0
        self._silent = 0

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        """Add an element to the document; the parser calls it for each start tag.

        Raises `NodeError` beyond the limits of elements, attributes and depth.
        """
        document = self.document
        position = len(document.elements)
        self._attributes += len(attributes)
        _check_size(position + 1, self._attributes, len(self._open) + 1)
        self._separate_words(tag)
        parent = self._open[-1] if self._open else None
        if parent is None:
            self._tops += 1
            place = self._tops
        else:
            parent.children += 1
            place = parent.children
        begin = len(document.texts)
        element = HtmlElement(
            tag=tag,
            attributes=dict(attributes),
            parent=parent,
            depth=len(self._open),
            place=place,
            position=position,
            end=position + 1,
            text_begin=begin,
            text_end=begin,
            classes=frozenset(attributes.get("class", "").split()),
            weight=1 + sum(map(len, attributes.values())) // USUAL_CHARACTERS,
        )
        document.elements.append(element)
        self._open.append(element)
        self._silent += tag in SILENT_TAGS

    def end(self, tag: str) -> None:
        element = self._open.pop()
        element.end = len(self.document.elements)
        element.text_end = len(self.document.texts)
        self._silent -= element.tag in SILENT_TAGS
        self._separate_words(tag)

    def data(self, text: str) -> None:
        if not self._silent:
            self.document.texts.append(text)

    def close(self) -> None:
        while self._open:
            self.end(self._open[-1].tag)

    def _separate_words(self, tag: str) -> None:
        if tag not in INLINE_TAGS:
            self.document.texts.append(" ")


def _check_size(elements: int, attributes: int, depth: int) -> None:
    if elements > MAXIMUM_ELEMENTS or attributes > MAXIMUM_ATTRIBUTES:
        most = f"{MAXIMUM_ELEMENTS:,} elements or {MAXIMUM_ATTRIBUTES:,} attributes"
        raise NodeError(f"The page has more than {most}", code="too-many-elements")
    if depth > MAXIMUM_DEPTH:
        message = f"Elements of the page are nested more than {MAXIMUM_DEPTH} deep"
        raise NodeError(message, code="too-deep")
