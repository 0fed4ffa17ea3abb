"""CSS selectors, matched in one pass over a document in linear time for any selector and page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from cssselect import parser as css
from cssselect.parser import SelectorError
from msgspec import Struct

from engine.run_errors import NodeError
from nodes.formats.html_document import MAXIMUM_DEPTH, HtmlElement

if TYPE_CHECKING:
    from concurrency.loop_share import LoopShare

ElementTest: TypeAlias = Callable[[HtmlElement], bool]

MAXIMUM_CHARACTERS = 500
SELECTOR_MARKS = ".#[:,>+~ "
"""One of these characters precedes every test except the first."""
MAXIMUM_STEPS = 5_000_000
"""Element tests per call of a node, weighted by the length of attributes: some three seconds, shared with others."""


class StepBudget:
    """Remaining work of one call."""

    def __init__(self) -> None:
        self._left = MAXIMUM_STEPS

    def take(self, count: int) -> None:
        """Subtract `count` from the remaining steps, of five million for one call of a node; raises `NodeError` if
        fewer are left.
        """
        self._left -= count
        if self._left < 0:
            message = f"The selectors would test elements more than {MAXIMUM_STEPS:,} times: take fewer fields or items"
            raise NodeError(message, code="took-too-long")


class SelectorPart(Struct, frozen=True):
    """Test of one element, and its relation to the element before: descendant, child, next or later sibling."""

    relation: str
    test: ElementTest


class CssSelector(Struct, frozen=True):
    """Alternative chains of parts; an element matches at the end of any chain."""

    chains: Sequence[Sequence[SelectorPart]]
    cost: int
    """Maximum number of tests per element."""

    async def find_first(
        self, count: int, elements: Sequence[HtmlElement], steps: StepBudget, turn: LoopShare
    ) -> list[HtmlElement]:
        """Return the first `count` elements of a list that match; relations to elements outside of the list don't
        count.

        `turn` lets other tasks run between elements. Raises `NodeError` when `steps` are used up.
        """
        passes = [ChainMatcher(chain) for chain in self.chains]
        found: list[HtmlElement] = []
        for element in elements:
            steps.take(self.cost * element.weight)
            await turn.yield_if_due()
            # Each pass must see every element, so all are evaluated before any answer counts.
            if True in [each.matches(element) for each in passes]:
                found.append(element)
                if len(found) == count:
                    break
        return found


class ChainMatcher:
    """Progress of one chain through a document; the matched parts of an element are bits."""

    def __init__(self, chain: Sequence[SelectorPart]) -> None:
        self._chain = chain
        self._last = 1 << (len(chain) - 1)
        levels = MAXIMUM_DEPTH + 2
        # By depth: matches of the parent, the ancestors, the earlier siblings and the previous sibling.
        self._reached = {kind: [0] * levels for kind in (">", " ", "~", "+")}

    def matches(self, element: HtmlElement) -> bool:
        """Return whether an element matches the whole chain; it must be called once for each element, in document
        order.
        """
        depth, reached = element.depth, self._reached
        matched = 0
        for number, part in enumerate(self._chain):
            may = number == 0 or reached[part.relation][depth] >> (number - 1) & 1
            if may and part.test(element):
                matched |= 1 << number
        reached["~"][depth] |= matched
        reached["+"][depth] = matched
        reached[">"][depth + 1] = matched
        reached[" "][depth + 1] = reached[" "][depth] | matched
        reached["~"][depth + 1] = reached["+"][depth + 1] = 0
        return bool(matched & self._last)


# ── compilation ─────────────────────────────────────────────────────────────────────────────────────────────


def compile_selector(name: str, written: str) -> CssSelector:
    """Return the compiled CSS selector of the config field `name`.

    Raises `NodeError` for one that is invalid, unsupported, over 500 characters or nested too deeply.
    """
    if len(written) > MAXIMUM_CHARACTERS:
        message = f"`{name}` has {len(written):,} characters; a selector has at most {MAXIMUM_CHARACTERS}"
        raise NodeError(message, code="invalid-selector")
    try:
        selectors = css.parse(written)
        if any(selector.pseudo_element for selector in selectors):
            raise NodeError(
                f"`{name}` has a pseudo-element: use an attribute or the text", code="invalid-selector"
            )
        chains = [_build_chain(selector.parsed_tree) for selector in selectors]
        return CssSelector(chains, cost=1 + sum(map(written.count, SELECTOR_MARKS)))
    except SelectorError as error:
        raise NodeError(f"`{name}` is not a valid selector: {error}", code="invalid-selector") from error
    except RecursionError as error:
        raise NodeError(f"`{name}` is nested too deeply", code="invalid-selector") from error
    except _UnsupportedSelector as error:
        message = f"`{name}`: {error} is not supported"
        raise NodeError(message, code="invalid-selector") from error


class _UnsupportedSelector(ValueError):
    """Unsupported CSS; the message is the unsupported part."""


def _build_chain(tree: css.Tree) -> list[SelectorPart]:
    parts: list[SelectorPart] = []
    while isinstance(tree, css.CombinedSelector):
        parts.append(SelectorPart(tree.combinator, _build_test(tree.subselector)))
        tree = tree.selector
    parts.append(SelectorPart(" ", _build_test(tree)))
    return parts[::-1]


def _build_test(tree: css.Tree) -> ElementTest:
    """Return the test of a compound selector, such as `a.b[c]:first-child`.

    Raises `_UnsupportedSelector` for other selectors.
    """
    match tree:
        case css.Element():
            return _tag_test(tree)
        case css.Class():
            inner, wanted = _build_test(tree.selector), tree.class_name
            return lambda element: wanted in element.classes and inner(element)
        case css.Hash():
            inner, wanted = _build_test(tree.selector), tree.id
            return lambda element: element.attributes.get("id") == wanted and inner(element)
        case css.Attrib():
            return _combine_tests(_build_test(tree.selector), _attribute_test(tree))
        case css.Pseudo():
            return _combine_tests(_build_test(tree.selector), _pseudo_class_test(tree.ident))
        case css.Function():
            return _combine_tests(_build_test(tree.selector), _parse_nth(tree))
        case css.Negation():
            refused = _build_test(tree.subselector)
            return _combine_tests(_build_test(tree.selector), lambda element: not refused(element))
        case css.Matching() | css.SpecificityAdjustment():
            accepted = [_build_test(each) for each in tree.selector_list]
            return _combine_tests(
                _build_test(tree.selector), lambda element: any(test(element) for test in accepted)
            )
        case _:
            raise _UnsupportedSelector(tree.canonical())


def _combine_tests(one: ElementTest, other: ElementTest) -> ElementTest:
    return lambda element: one(element) and other(element)


def _tag_test(tree: css.Element) -> ElementTest:
    if tree.namespace:
        raise _UnsupportedSelector(tree.canonical())
    if tree.element is None:
        return lambda _: True
    tag = tree.element.lower()
    return lambda element: element.tag == tag


def _attribute_test(tree: css.Attrib) -> ElementTest:
    if tree.namespace:
        raise _UnsupportedSelector(tree.canonical())
    name = tree.attrib.lower()
    if tree.operator == "exists" or tree.value is None:
        return lambda element: name in element.attributes
    if tree.operator not in ATTRIBUTE_OPERATORS:
        raise _UnsupportedSelector(tree.canonical())
    compare, wanted = ATTRIBUTE_OPERATORS[tree.operator], tree.value.value or ""
    return lambda element: name in element.attributes and compare(element.attributes[name], wanted)


ATTRIBUTE_OPERATORS: Mapping[str, Callable[[str, str], bool]] = {
    "=": lambda value, wanted: value == wanted,
    "!=": lambda value, wanted: value != wanted,
    "~=": lambda value, wanted: wanted in value.split(),
    "|=": lambda value, wanted: value == wanted or value.startswith(wanted + "-"),
    "^=": lambda value, wanted: bool(wanted) and value.startswith(wanted),
    "$=": lambda value, wanted: bool(wanted) and value.endswith(wanted),
    "*=": lambda value, wanted: bool(wanted) and wanted in value,
}


def _pseudo_class_test(name: str) -> ElementTest:
    match name:
        case "first-child":
            return lambda element: element.place == 1
        case "last-child":
            return lambda element: element.place_from_end == 1
        case "only-child":
            return lambda element: element.place == element.place_from_end == 1
        case _:
            raise _UnsupportedSelector(f":{name}")


def _parse_nth(tree: css.Function) -> ElementTest:
    try:
        step, first = css.parse_series(tree.arguments)
    except ValueError as error:
        raise _UnsupportedSelector(f":{tree.name}()") from error
    match tree.name:
        case "nth-child":
            return lambda element: _is_in_series(element.place, step, first)
        case "nth-last-child":
            return lambda element: _is_in_series(element.place_from_end, step, first)
        case _:
            raise _UnsupportedSelector(f":{tree.name}()")


def _is_in_series(place: int, step: int, first: int) -> bool:
    """Return whether a place, from 1, is `step * n + first` for some integer n from 0."""
    if step == 0:
        return place == first
    return (place - first) % step == 0 and (place - first) // step >= 0
