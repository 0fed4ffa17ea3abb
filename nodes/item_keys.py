"""Keys of items, by which nodes sort, join and deduplicate lists."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Self

from msgspec import Struct, field

from engine.expressions import ValueTemplate, compile_value
from engine.run_errors import NodeError
from nodes import config_fields
from nodes.output_sizes import OutputSize

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_KEYS = 20
ITEM_ROOTS = ("item", "index")


class ItemKey(Struct, frozen=True):
    """Key of items: a field name, or an expression that is evaluated for each item."""

    call: NodeCall
    source: str | ValueTemplate
    """Name of a field, or template to render for each item."""
    lacking: Counter[str] = field(default_factory=Counter)
    """Number of items without a field, by its path."""
    size: OutputSize = field(default_factory=lambda: OutputSize("The keys of the items"))

    @classmethod
    def from_config(cls, name: str, call: NodeCall, source: Json) -> Self:
        """Return the key for `source`, an entry of the config field `name`: the name of an item's field, or an
        expression.

        An expression without `item` or `index` is rendered once, now, to the name of a field; others are rendered for
        each item. Raises `ExpressionError`, and `NodeError` for a name that is no text.
        """
        template = compile_value(source)
        if any(path.root in ITEM_ROOTS for path in template.paths):
            return cls(call, template)
        return cls.from_name(name, call, template.render(call.scope, call.unresolved))

    @classmethod
    def from_name(cls, name: str, call: NodeCall, value: Json) -> Self:
        if not isinstance(value, str) or not value:
            raise config_fields.invalid_field(name, "names of fields, or templates of `item`", value)
        return cls(call, value)

    def value_of(self, item: Json, index: int) -> Json:
        """Return the key of an item: its field, or the template rendered for it; null for a missing field, which is
        counted.

        A field raises `NodeError` for an item that is no object. A template takes any item, and raises
        `ExpressionError`, or `NodeError` if its keys become too large in total.
        """
        if isinstance(self.source, str):
            return self._field(self.source, item, index)
        unresolved: list[str] = []
        value = self.source.render(self.call.scope_of(item, index), unresolved)
        for path in set(unresolved):
            self._count_missing(path)
        self.size.add(value)
        return value

    def missing_paths(self, item_count: int) -> list[str]:
        """Return the paths that were missing in all of the `item_count` items passed to `value_of`, and are probably
        misspelled; without items, all paths.
        """
        if isinstance(self.source, str):
            needed = [f"item.{self.source}"]
        else:
            needed = [path.text for path in self.source.needed if path.root == "item" and path.steps]
        return [path for path in needed if self.lacking[path] == item_count]

    def _field(self, name: str, item: Json, index: int) -> Json:
        found, is_found = look_up_field(name, item, index)
        if not is_found:
            self._count_missing(f"item.{name}")
        return found

    def _count_missing(self, path: str) -> None:
        """Count an item that lacks a path, and at the first such item add the path to the unresolved paths
        of the call.
        """
        if path not in self.lacking:
            self.call.unresolved.append(path)
        self.lacking[path] += 1


class ItemKeys(Struct, frozen=True):
    """Composite key: the keys in one config field."""

    parts: list[ItemKey]

    @classmethod
    def from_config(cls, call: NodeCall, name: str) -> Self:
        """Return the keys that the config field `name` lists, or that its expression gives.

        Raises `NodeError` for none or over 20, and `ExpressionError`.
        """
        template = call.values[name]
        if isinstance(template.source, list):
            parts = [ItemKey.from_config(name, call, entry) for entry in template.source]
        else:
            names = config_fields.read_sequence({name: template.render(call.scope, call.unresolved)}, name)
            parts = [ItemKey.from_name(name, call, entry) for entry in names]
        require_key_count(name, len(parts))
        return cls(parts)

    def values_of(self, item: Json, index: int) -> list[Json]:
        return [part.value_of(item, index) for part in self.parts]


def require_key_count(name: str, count: int) -> None:
    if not 1 <= count <= MAXIMUM_KEYS:
        raise NodeError(f"`{name}` must have 1 to {MAXIMUM_KEYS} keys, not {count:,}", code="invalid-config")


def look_up_field(name: str, item: Json, index: int) -> tuple[Json, bool]:
    """Return the value of an item's field by its name or dotted path, and True; null and False if it is missing.

    A field with the whole name wins over the path. Raises `NodeError` if the item is no object.
    """
    own = require_item_fields(item, index, f"it has no field `{name}`")
    if name in own:
        return own[name], True
    found: Json = own
    for step in name.split("."):
        if not isinstance(found, dict) or step not in found:
            return None, False
        found = found[step]
    return found, True


def require_item_fields(item: Json, index: int, consequence: str) -> dict[str, Json]:
    """Return an item if it is an object; otherwise raise `NodeError` with its index, type and `consequence`."""
    if isinstance(item, dict):
        return item
    raise NodeError(
        f"Item {index} is {config_fields.describe_type(item)}: {consequence}", code="not-an-object"
    )
