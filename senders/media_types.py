"""Media types (RFC 9110, section 8.3.1): a name and parameters."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

_PARAMETER: Final = re.compile(r""";[ \t]*(?:([^\s;="]+)=(?:"((?:[^"\\]|\\.)*)"[ \t]*|([^;"]*)))?""")
_ESCAPED: Final = re.compile(r'\\(["\\])')


@dataclass(frozen=True, slots=True)
class MediaType:
    """Media type name in lower case, such as `text/plain`, and parameters by lower-case names."""

    name: str
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_json(self) -> bool:
        """Tell whether the media type is JSON or has the suffix `+json`."""
        return self.name == "application/json" or self.name.endswith("+json")


def parse_media_type(text: str) -> MediaType:
    """Return the value and the parameters of a header; of repeated parameters the first counts.

    Nothing is refused: parameters that can't be parsed are left out.
    """
    name, separator, rest = text.partition(";")
    parameters: dict[str, str] = {}
    for parameter in _PARAMETER.finditer(separator + rest):
        key, quoted, plain = parameter.groups()
        if key is not None:
            value = plain.strip() if quoted is None else _ESCAPED.sub(r"\1", quoted)
            parameters.setdefault(key.lower(), value)
    return MediaType(name.strip().lower(), parameters)
