"""What a body, or a part of one, is said to be: a name and its parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_PARAMETER: Final = re.compile(r""";[ \t]*(?:([^\s;="]+)=(?:"((?:[^"\\]|\\.)*)"[ \t]*|([^;"]*)))?""")
_ESCAPED: Final = re.compile(r'\\(["\\])')


@dataclass(frozen=True, slots=True)
class MediaType:
    """A name in lower case, such as `text/plain`, and its parameters by names in lower case."""

    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_json(self) -> bool:
        """Tell whether the body is JSON, be it of a kind of its own."""
        return self.name == "application/json" or self.name.endswith("+json")


def parse_media_type(text: str) -> MediaType:
    """Return what a header says that has a value and parameters; of a parameter given twice the first counts.

    Nothing is wrong enough to be refused here: what can't be read of the parameters is left out.
    """
    name, separator, rest = text.partition(";")
    parameters: dict[str, str] = {}
    for parameter in _PARAMETER.finditer(separator + rest):
        key, quoted, plain = parameter.groups()
        if key is not None:
            value = plain.strip() if quoted is None else _ESCAPED.sub(r"\1", quoted)
            parameters.setdefault(key.lower(), value)
    return MediaType(name.strip().lower(), parameters)
