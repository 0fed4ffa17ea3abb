"""CSS selectors, matched in one pass over a document: no selector and no page makes that more than linear."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from cssselect import parser as css
from cssselect.parser import SelectorError

from engine.run_errors import NodeError
from nodes.document import MAXIMUM_DEPTH, Element

if TYPE_CHECKING:
    from concurrency.loop_share import Turn

Test: TypeAlias = Callable[[Element], bool]

MAXIMUM_CHARACTERS = 500
MARKS = ".#[:,>+~ "
"""One of these stands before every test but the first."""
MAXIMUM_STEPS = 5_000_000
"""Tests of elements in one call of a node, more for those with long attributes: some three seconds, shared."""


class Steps:
    """How much of the work of one call is done."""

    def __init__(self) -> None:
        self._left = MAXIMUM_STEPS

    def take(self, count: int) -> None:
        """Count some work; raises `NodeError` when it has become too much."""
        self._left -= count
        if self._left < 0:
            message = f"The selectors would test elements more than {MAXIMUM_STEPS:,} times: take fewer fields or items"
            raise NodeError(message, code="took-too-long")


@dataclass(frozen=True, slots=True)
class Part:
    """What one element must be, and how it stands to the one before it: inside, child of, next to, after."""

    relation: str
    test: Test


@dataclass(frozen=True, slots=True)
class Selector:
    """Some chains of parts, of which an element must end any."""

    chains: Sequence[Sequence[Part]]
    cost: int
    """How many tests one element goes through at most."""

    async def first(self, count: int, elements: Sequence[Element], steps: Steps, turn: Turn) -> list[Element]:
        """Return the first so many that match of a stretch of a document; all that is outside doesn't count."""
        passes = [Pass(chain) for chain in self.chains]
        found: list[Element] = []
        for element in elements:
            steps.take(self.cost * element.weight)
            await turn.share()
            # Each pass must see every element, so all are asked before any answer counts.
            if True in [each.matches(element) for each in passes]:
                found.append(element)
                if len(found) == count:
                    break
        return found


class Pass:
    """One chain on its way through a document; which of its parts an element matched is a bit each."""

    def __init__(self, chain: Sequence[Part]) -> None:
        self._chain = chain
        self._last = 1 << (len(chain) - 1)
        levels = MAXIMUM_DEPTH + 2
        # By depth: what is known of the parents, ancestors, elder siblings and the last one of those.
        self._reached = {kind: [0] * levels for kind in (">", " ", "~", "+")}

    def matches(self, element: Element) -> bool:
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


# ── compiled ────────────────────────────────────────────────────────────────────────────────────────────────


def compiled(name: str, written: str) -> Selector:
    """Return the selector that the field `name` holds; raises `NodeError`."""
    if len(written) > MAXIMUM_CHARACTERS:
        message = f"`{name}` has {len(written):,} characters; a selector has at most {MAXIMUM_CHARACTERS}"
        raise NodeError(message, code="invalid-selector")
    try:
        selectors = css.parse(written)
        if any(selector.pseudo_element for selector in selectors):
            raise NodeError(
                f"`{name}` has a pseudo-element: take an attribute or the text", code="invalid-selector"
            )
        chains = [_chain(selector.parsed_tree) for selector in selectors]
        return Selector(chains, cost=1 + sum(map(written.count, MARKS)))
    except SelectorError as error:
        raise NodeError(f"`{name}` is no selector: {error}", code="invalid-selector") from error
    except RecursionError as error:
        raise NodeError(f"`{name}` has too much inside one another", code="invalid-selector") from error
    except _Unsupported as error:
        message = f"`{name}`: {error} isn't among what selects here"
        raise NodeError(message, code="invalid-selector") from error


class _Unsupported(ValueError):
    """CSS that isn't matched; the message is that piece of it."""


def _chain(tree: css.Tree) -> list[Part]:
    parts: list[Part] = []
    while isinstance(tree, css.CombinedSelector):
        parts.append(Part(tree.combinator, _test(tree.subselector)))
        tree = tree.selector
    parts.append(Part(" ", _test(tree)))
    return parts[::-1]


def _test(tree: css.Tree) -> Test:
    """Return what one element is tested by: everything that stands together without a combinator."""
    match tree:
        case css.Element():
            return _tag(tree)
        case css.Class():
            inner, wanted = _test(tree.selector), tree.class_name
            return lambda element: wanted in element.classes and inner(element)
        case css.Hash():
            inner, wanted = _test(tree.selector), tree.id
            return lambda element: element.attributes.get("id") == wanted and inner(element)
        case css.Attrib():
            return _both(_test(tree.selector), _attribute(tree))
        case css.Pseudo():
            return _both(_test(tree.selector), _pseudo_class(tree.ident))
        case css.Function():
            return _both(_test(tree.selector), _nth(tree))
        case css.Negation():
            refused = _test(tree.subselector)
            return _both(_test(tree.selector), lambda element: not refused(element))
        case css.Matching() | css.SpecificityAdjustment():
            accepted = [_test(each) for each in tree.selector_list]
            return _both(_test(tree.selector), lambda element: any(test(element) for test in accepted))
        case _:
            raise _Unsupported(tree.canonical())


def _both(one: Test, other: Test) -> Test:
    return lambda element: one(element) and other(element)


def _tag(tree: css.Element) -> Test:
    if tree.namespace:
        raise _Unsupported(tree.canonical())
    if tree.element is None:
        return lambda _: True
    tag = tree.element.lower()
    return lambda element: element.tag == tag


def _attribute(tree: css.Attrib) -> Test:
    if tree.namespace:
        raise _Unsupported(tree.canonical())
    name = tree.attrib.lower()
    if tree.operator == "exists" or tree.value is None:
        return lambda element: name in element.attributes
    if tree.operator not in COMPARE:
        raise _Unsupported(tree.canonical())
    compare, wanted = COMPARE[tree.operator], tree.value.value or ""
    return lambda element: name in element.attributes and compare(element.attributes[name], wanted)


COMPARE: Mapping[str, Callable[[str, str], bool]] = {
    "=": lambda value, wanted: value == wanted,
    "!=": lambda value, wanted: value != wanted,
    "~=": lambda value, wanted: wanted in value.split(),
    "|=": lambda value, wanted: value == wanted or value.startswith(wanted + "-"),
    "^=": lambda value, wanted: bool(wanted) and value.startswith(wanted),
    "$=": lambda value, wanted: bool(wanted) and value.endswith(wanted),
    "*=": lambda value, wanted: bool(wanted) and wanted in value,
}


def _pseudo_class(name: str) -> Test:
    match name:
        case "first-child":
            return lambda element: element.place == 1
        case "last-child":
            return lambda element: element.place_from_end == 1
        case "only-child":
            return lambda element: element.place == element.place_from_end == 1
        case _:
            raise _Unsupported(f":{name}")


def _nth(tree: css.Function) -> Test:
    try:
        step, first = css.parse_series(tree.arguments)
    except ValueError as error:
        raise _Unsupported(f":{tree.name}()") from error
    match tree.name:
        case "nth-child":
            return lambda element: _is_in_series(element.place, step, first)
        case "nth-last-child":
            return lambda element: _is_in_series(element.place_from_end, step, first)
        case _:
            raise _Unsupported(f":{tree.name}()")


def _is_in_series(place: int, step: int, first: int) -> bool:
    """Whether a place is `step * n + first` for some n from 0."""
    if step == 0:
        return place == first
    return (place - first) % step == 0 and (place - first) // step >= 0
