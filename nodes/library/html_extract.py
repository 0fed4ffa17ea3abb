"""Extract texts and attributes from an HTML page by CSS selectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Self

from msgspec import Struct

from concurrency.loop_share import LoopShare
from engine.run_errors import NodeError
from nodes import config_fields
from nodes.formats import css_selectors, html_document

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json
    from nodes.formats.css_selectors import CssSelector, StepBudget
    from nodes.formats.html_document import HtmlDocument, HtmlElement

MAXIMUM_FIELDS = 50
MAXIMUM_VALUES = 500_000
MAXIMUM_CHARACTERS = 10_000_000
"""Maximum number of extracted characters, including spaces: nested elements repeat the same text."""


class ExtractedField(Struct, frozen=True):
    """Field to extract from each item."""

    name: str
    selector: CssSelector | None
    attribute: str
    takes_all: bool

    @classmethod
    def from_config(cls, name: str, config: Json) -> Self:
        if not isinstance(config, dict):
            raise config_fields.invalid_field(f"fields.{name[:100]}", "an object", config)
        given = {"selector": "", "attribute": "", "all": False, **config}
        selector = config_fields.read_text(given, "selector")
        return cls(
            name,
            css_selectors.compile_selector(f"fields.{name[:100]}.selector", selector) if selector else None,
            config_fields.read_text(given, "attribute").lower(),
            config_fields.read_flag(given, "all"),
        )


async def run(call: NodeCall) -> Json:
    taken = [
        ExtractedField.from_config(name, each)
        for name, each in config_fields.read_mapping(call.config, "fields").items()
    ]
    if len(taken) > MAXIMUM_FIELDS:
        message = f"`fields` has {len(taken):,} fields; at most {MAXIMUM_FIELDS} are taken"
        raise NodeError(message, code="invalid-config")
    item_selector = config_fields.read_text(call.config, "items")
    selector = css_selectors.compile_selector("items", item_selector) if item_selector else None
    page = await html_document.read_document(config_fields.read_text(call.config, "html"), LoopShare())
    extraction = PageExtractor(page, taken)
    items = await extraction.extract_items(selector)
    call.unresolved.extend(f"item.{name}" for name in sorted(extraction.missing))
    return {"items": items, "count": len(items)}


class PageExtractor:
    """Extraction from one page, with its counters."""

    def __init__(self, page: HtmlDocument, taken: Sequence[ExtractedField]) -> None:
        self.missing: set[str] = set()
        """Names of fields that some item lacks."""
        self._page = page
        self._fields = taken
        self._turn = LoopShare()
        self._steps: StepBudget = css_selectors.StepBudget()
        self._values = 0
        self._characters = 0

    async def extract_items(self, selector: CssSelector | None) -> list[Json]:
        """Return the extracted items: one for each element that the selector matches; without a selector, one for the
        whole page.

        Raises `NodeError` beyond the limits of steps, values and characters.
        """
        elements = self._page.elements
        if selector is None:
            return [await self._extract_item(elements[0] if elements else None, elements)]
        found = await selector.find_first(len(elements), elements, self._steps, self._turn)
        return [await self._extract_item(element, self._page.list_descendants(element)) for element in found]

    async def _extract_item(self, element: HtmlElement | None, elements: Sequence[HtmlElement]) -> Json:
        return {each.name: await self._extract_field(each, element, elements) for each in self._fields}

    async def _extract_field(
        self, each: ExtractedField, element: HtmlElement | None, elements: Sequence[HtmlElement]
    ) -> Json:
        """Return the value of a field: of the first match of its selector among `elements`, or of all as a list;
        without a selector, of `element` itself.

        Without a match, an empty list for all; else null, and the name of the field is added to `missing`. Raises
        `NodeError` beyond the limits.
        """
        self._count(1, 0)
        found = [element] if element else []
        if each.selector is not None:
            most = len(elements) if each.takes_all else 1
            found = await each.selector.find_first(most, elements, self._steps, self._turn)
        values: list[Json] = []
        for one in found:
            await self._turn.yield_if_due()
            values.append(self._extract_value(each, one))
        if each.takes_all:
            return values
        value = values[0] if values else None
        if value is None:
            self.missing.add(each.name)
        return value

    def _extract_value(self, each: ExtractedField, element: HtmlElement) -> Json:
        value = element.attributes.get(each.attribute) if each.attribute else self._page.text(element)
        self._count(1, len(value or ""))
        if value is None or each.attribute:
            return value
        return " ".join(value.split())

    def _count(self, values: int, characters: int) -> None:
        """Count extracted values and characters; raises `NodeError` beyond the limits."""
        self._values += values
        self._characters += characters
        if self._values > MAXIMUM_VALUES or self._characters > MAXIMUM_CHARACTERS:
            most = f"{MAXIMUM_VALUES:,} values or {MAXIMUM_CHARACTERS:,} characters"
            raise NodeError(f"The items have more than {most}: select less", code="output-too-large")
