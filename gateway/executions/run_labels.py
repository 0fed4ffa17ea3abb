"""Tags and metadata of executions: their form in bodies and queries, and their rows."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gateway.http import limits
from gateway.http.errors import invalid_query
from gateway.http.parameters import QueryParameter
from models.execution_label import TAG_KEY

if TYPE_CHECKING:
    from engine.values import Json

METADATA_KEY: Final = re.compile(r"[a-z][A-Za-z0-9_-]{0,39}\Z")
"""Form of the keys of metadata."""
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
        return {"type": "string", "maxLength": limits.METADATA_VALUE_LENGTH}

    def has_name(self, name: str) -> bool:
        return name.startswith(PREFIX)

    def collect(self, query: Mapping[str, Sequence[str]]) -> Sequence[str]:
        """Return `key=value` texts, the last value of each key; keys contain no `=`."""
        given = {name: values for name, values in query.items() if self.has_name(name) and values}
        return [f"{name.removeprefix(PREFIX)}={values[-1]}" for name, values in given.items()]

    def read(self, given: Sequence[str]) -> Sequence[tuple[str, str]]:
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
            if "\0" in value or len(value) > limits.METADATA_VALUE_LENGTH:
                text = (
                    f"A value of metadata has at most {limits.METADATA_VALUE_LENGTH} characters, and no NUL"
                )
                raise invalid_query(PREFIX + key, "invalid-value", text)
            pairs.append((key, value))
        return pairs


def filter_labels(tag: str | None, metadata: Sequence[tuple[str, str]]) -> Sequence[tuple[str, str]]:
    """Return the labels that a list is filtered by."""
    return [*([] if tag is None else [(TAG_KEY, tag)]), *metadata]
