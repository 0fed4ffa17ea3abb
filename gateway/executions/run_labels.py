"""Tags and metadata of executions: their form in bodies and queries, and their rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Final, TypeAlias

from msgspec import Meta

from engine.values import value_as_text
from gateway.http import limits, text_rules
from gateway.http.errors import invalid_query
from gateway.http.parameters import QueryParameter
from gateway.http.text_rules import ProblemCollector
from journal.run_labels import MAX_VALUE_CHARACTERS, METADATA_KEY
from models.execution_label import TAG_KEY

if TYPE_CHECKING:
    from engine.values import Json
    from journal.run_labels import RunLabel

Tags: TypeAlias = Annotated[
    list[Annotated[str, text_rules.describe_length(limits.EXECUTION_TAG_LENGTH, min_length=1)]],
    Meta(max_length=limits.EXECUTION_TAGS),
]
Metadata: TypeAlias = Annotated[dict[str, str | int | float | bool], Meta(max_length=limits.METADATA_KEYS)]
"""Values by key; a key matches `^[a-z][A-Za-z0-9_-]{0,39}$`, and a text has at most 256 characters."""
PREFIX: Final = "metadata."


@dataclass(frozen=True, slots=True, eq=False)
class MetadataParameter(QueryParameter[Sequence[tuple[str, str]]]):
    """Metadata that a listed execution must have, as `metadata.<key>=<value>`; up to three keys."""

    name: str = PREFIX + "key"
    description: str = (
        "Only executions with exactly this value under a key of their metadata. The part behind the dot is the"
        f" key, as in `metadata.order=7`; up to {limits.METADATA_FILTERS} keys."
    )

    @property
    def schema(self) -> dict[str, Json]:
        return {"type": "string", "maxLength": MAX_VALUE_CHARACTERS}

    def has_name(self, name: str) -> bool:
        return name.startswith(PREFIX)

    def collect(self, query: Mapping[str, Sequence[str]]) -> Sequence[str]:
        """Return the parameters `metadata.<key>` of a query as texts `key=value`, the last value of each key."""
        given = {name: values for name, values in query.items() if self.has_name(name) and values}
        return [f"{name.removeprefix(PREFIX)}={values[-1]}" for name, values in given.items()]

    def read(self, given: Sequence[str]) -> Sequence[tuple[str, str]]:
        """Return the pairs of key and value of texts `key=value`; raises a 400 error for over three keys, and
        an invalid key or value.
        """
        if len(given) > limits.METADATA_FILTERS:
            text = f"A list is filtered by at most {limits.METADATA_FILTERS} keys of metadata"
            raise invalid_query(self.name, "too-many", text)
        pairs = []
        for one in given:
            key, _, value = one.partition("=")
            if not METADATA_KEY.match(key):
                text = (
                    "The key behind metadata. must match ^[a-z][A-Za-z0-9_-]{0,39}$, as in metadata.order=7"
                )
                raise invalid_query(self.name, "invalid-key", text)
            if "\0" in value or len(value) > MAX_VALUE_CHARACTERS:
                text = f"A value of metadata has at most {MAX_VALUE_CHARACTERS} characters, and no NUL"
                raise invalid_query(PREFIX + key, "invalid-value", text)
            pairs.append((key, value))
        return pairs


def filter_labels(tag: str | None, metadata: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """Return the labels (pairs of key and value) that a list is filtered by: a tag, None for none, and metadata."""
    return [*([] if tag is None else [(TAG_KEY, tag)]), *metadata]


def read_labels(
    tags: Sequence[str] | None,
    metadata: Mapping[str, str | float] | None,
    path: str = "",
) -> Sequence[RunLabel]:
    """Return the sorted labels of a body, without duplicates: its tags and metadata; empty for None.

    `path` precedes the names of fields in errors. Raises a 422 error with all invalid tags, keys and values.
    """
    problems = ProblemCollector()
    labels = {
        (TAG_KEY, text_rules.check_line(tag, f"{path}tags", problems, max_length=limits.EXECUTION_TAG_LENGTH))
        for tag in tags or ()
    }
    for key, value in (metadata or {}).items():
        text = value_as_text(value)
        if not METADATA_KEY.match(key):
            message = "A key of metadata must match ^[a-z][A-Za-z0-9_-]{0,39}$, as in order"
            problems.add(f"{path}metadata", "invalid-key", message)
        elif len(text) > MAX_VALUE_CHARACTERS or "\0" in text:
            message = f"A value of metadata has at most {MAX_VALUE_CHARACTERS} characters, and no NUL"
            problems.add(f"{path}metadata.{key}", "invalid-value", message)
        labels.add((key, text))
    problems.raise_any()
    return sorted(labels)
