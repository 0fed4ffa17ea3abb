"""Texts and attributes are taken out of a page by CSS selectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from concurrency.loop_share import Turn
from engine.run_errors import NodeError
from nodes import document, fields, selectors

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json
    from nodes.document import Document, Element
    from nodes.selectors import Selector, Steps

MAXIMUM_FIELDS = 50
MAXIMUM_VALUES = 500_000
MAXIMUM_CHARACTERS = 10_000_000
"""Of all that is taken, spaces included: elements inside one another have the same text again."""


@dataclass(frozen=True, slots=True)
class Field:
    """What to take of an item, and where to look for it."""

    name: str
    selector: Selector | None
    attribute: str
    takes_all: bool

    @classmethod
    def of(cls, name: str, config: Json) -> Self:
        if not isinstance(config, dict):
            raise fields.unfit(f"fields.{name[:100]}", "an object", config)
        given = {"selector": "", "attribute": "", "all": False, **config}
        selector = fields.text(given, "selector")
        return cls(
            name,
            selectors.compiled(f"fields.{name[:100]}.selector", selector) if selector else None,
            fields.text(given, "attribute").lower(),
            fields.flag(given, "all"),
        )


async def run(call: NodeCall) -> Json:
    taken = [Field.of(name, each) for name, each in fields.mapping(call.config, "fields").items()]
    if len(taken) > MAXIMUM_FIELDS:
        message = f"`fields` has {len(taken):,} fields; at most {MAXIMUM_FIELDS} are taken"
        raise NodeError(message, code="invalid-config")
    item_selector = fields.text(call.config, "items")
    selector = selectors.compiled("items", item_selector) if item_selector else None
    page = await document.read(fields.text(call.config, "html"), Turn())
    extraction = Extraction(page, taken)
    items = await extraction.items(selector)
    call.unresolved.extend(f"item.{name}" for name in sorted(extraction.missing))
    return {"items": items, "count": len(items)}


class Extraction:
    """One page, and what has been taken of it."""

    def __init__(self, page: Document, taken: Sequence[Field]) -> None:
        self.missing: set[str] = set()
        """Names of fields that some item lacked."""
        self._page = page
        self._fields = taken
        self._turn = Turn()
        self._steps: Steps = selectors.Steps()
        self._values = 0
        self._characters = 0

    async def items(self, selector: Selector | None) -> list[Json]:
        elements = self._page.elements
        if selector is None:
            return [await self._item(elements[0] if elements else None, elements)]
        found = await selector.first(len(elements), elements, self._steps, self._turn)
        return [await self._item(element, self._page.inside(element)) for element in found]

    async def _item(self, element: Element | None, elements: Sequence[Element]) -> Json:
        return {each.name: await self._field(each, element, elements) for each in self._fields}

    async def _field(self, each: Field, element: Element | None, elements: Sequence[Element]) -> Json:
        self._count(1, 0)
        found = [element] if element else []
        if each.selector is not None:
            most = len(elements) if each.takes_all else 1
            found = await each.selector.first(most, elements, self._steps, self._turn)
        values: list[Json] = []
        for one in found:
            await self._turn.share()
            values.append(self._value(each, one))
        if each.takes_all:
            return values
        value = values[0] if values else None
        if value is None:
            self.missing.add(each.name)
        return value

    def _value(self, each: Field, element: Element) -> Json:
        value = element.attributes.get(each.attribute) if each.attribute else self._page.text(element)
        self._count(1, len(value or ""))
        if value is None or each.attribute:
            return value
        return " ".join(value.split())

    def _count(self, values: int, characters: int) -> None:
        self._values += values
        self._characters += characters
        if self._values > MAXIMUM_VALUES or self._characters > MAXIMUM_CHARACTERS:
            most = f"{MAXIMUM_VALUES:,} values or {MAXIMUM_CHARACTERS:,} characters"
            raise NodeError(f"The items have more than {most}: select less", code="output-too-large")
