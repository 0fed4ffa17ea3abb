"""Search a text by a user's regular expression, with an engine that runs in linear time.

One search is bounded by the size of the expression times that of the text. Many searches of one text are not, since
each may read on to its end: they have a deadline.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from itertools import islice
from typing import TYPE_CHECKING, Protocol, cast

import re2

from engine.run_errors import NodeError
from nodes import config_fields, output_sizes

if TYPE_CHECKING:
    from engine.node_api import NodeCall
    from engine.values import Json

MAXIMUM_CHARACTERS = 1_000_000
MAXIMUM_PATTERN_CHARACTERS = 2_000
MAXIMUM_MATCHES = 100_000
MAXIMUM_GROUPS = 100
MAXIMUM_STEPS = 300_000_000
"""Size of the compiled expression times characters of the text: at worst, some two seconds of one core."""
MAXIMUM_SECONDS = 5.0
PROGRAM_MEMORY_BYTES = 2 << 20
"""Maximum memory of an expression, compiled and while it searches."""

GROUP_REFERENCE = re.compile(r"\$(?:(\$)|(\d{1,2})|\{([A-Za-z0-9_]{1,100})\})")


class RegexOperation(StrEnum):
    MATCH = "match"
    FIND_ALL = "find-all"
    REPLACE = "replace"
    SPLIT = "split"


class RegexMatch(Protocol):
    """Match of RE2."""

    def start(self, group: int = 0) -> int: ...
    def end(self, group: int = 0) -> int: ...
    def group(self) -> str: ...
    def groups(self) -> tuple[str | None, ...]: ...
    def groupdict(self) -> dict[str, str | None]: ...
    def __getitem__(self, group: int | str) -> str | None: ...


class RegexPattern(Protocol):
    """Compiled expression of RE2."""

    groups: int
    groupindex: Mapping[str, int]
    programsize: int

    def finditer(self, text: str) -> Iterator[RegexMatch]: ...


def run(call: NodeCall) -> Json:
    config = call.config
    text = config_fields.read_text(config, "text")
    pattern = _compile_pattern(config)
    _check_size(text, pattern)
    maximum = int(config_fields.read_number(config, "maxMatches", minimum=1, maximum=MAXIMUM_MATCHES))
    match config_fields.read_choice(config, "operation", RegexOperation):
        case RegexOperation.MATCH:
            return _describe_matches(pattern, islice(_find_matches(pattern, text, MAXIMUM_MATCHES), 1))
        case RegexOperation.FIND_ALL:
            return _describe_matches(pattern, _find_matches(pattern, text, maximum))
        case RegexOperation.REPLACE:
            return _replace_matches(pattern, text, maximum, config_fields.read_text(config, "replacement"))
        case RegexOperation.SPLIT:
            return _split_text(pattern, text, maximum)


def _compile_pattern(config: Mapping[str, Json]) -> RegexPattern:
    """Return the compiled `pattern` of the config with its flags; raises `NodeError` for an invalid pattern, and for
    over 100 groups.
    """
    written = config_fields.read_text(config, "pattern")
    if not 1 <= len(written) <= MAXIMUM_PATTERN_CHARACTERS:
        message = f"`pattern` must have 1 to {MAXIMUM_PATTERN_CHARACTERS:,} characters, not {len(written):,}"
        raise NodeError(message, code="invalid-config")
    flags = [("ignoreCase", "i"), ("multiline", "m"), ("dotAll", "s")]
    set_flags = "".join(flag for name, flag in flags if config_fields.read_flag(config, name))
    options = re2.Options()
    options.log_errors = False
    options.max_mem = PROGRAM_MEMORY_BYTES
    try:
        pattern = cast(
            "RegexPattern", re2.compile(f"(?{set_flags}){written}" if set_flags else written, options)
        )
    except re2.error as error:
        reason = bytes(error.args[0]).decode(errors="replace")
        raise NodeError(f"`pattern` is not a valid expression: {reason}", code="invalid-pattern") from error
    finally:
        # The cache would keep the last 128 expressions, with the memory of their searches.
        re2.purge()
    if pattern.groups > MAXIMUM_GROUPS:
        message = f"`pattern` has {pattern.groups:,} groups; at most {MAXIMUM_GROUPS} are returned"
        raise NodeError(message, code="invalid-pattern")
    return pattern


def _check_size(text: str, pattern: RegexPattern) -> None:
    if len(text) > MAXIMUM_CHARACTERS:
        message = f"`text` has {len(text):,} characters; at most {MAXIMUM_CHARACTERS:,} are searched"
        raise NodeError(message, code="input-too-large")
    most = MAXIMUM_STEPS // pattern.programsize
    if len(text) > most:
        message = (
            f"`text` has {len(text):,} characters; this `pattern` repeats so much that {most:,} are searched"
        )
        raise NodeError(message, code="input-too-large")


def _find_matches(pattern: RegexPattern, text: str, maximum: int) -> Iterator[RegexMatch]:
    """Yield every match in order; raises `NodeError` after `maximum` matches if there is another, and after
    five seconds.
    """
    deadline = time.monotonic() + MAXIMUM_SECONDS
    for count, match in enumerate(pattern.finditer(text), start=1):
        if count > maximum:
            message = (
                f"There are more than {maximum:,} matches; `maxMatches` may be up to {MAXIMUM_MATCHES:,}"
            )
            raise NodeError(message, code="too-many-matches")
        if time.monotonic() > deadline:
            message = f"After {MAXIMUM_SECONDS:g} s and {count:,} matches the search had not ended: search less text"
            raise NodeError(message, code="took-too-long")
        yield match


def _describe_matches(pattern: RegexPattern, matches: Iterator[RegexMatch]) -> Json:
    size = output_sizes.OutputSize("The matches")
    found: list[Json] = []
    for match in matches:
        # Each group is a copy of its part of the text, and a hundred may be nested.
        _require_small_groups(match, pattern)
        shown = _describe_match(match)
        size.add(shown)
        found.append(shown)
    return {"found": bool(found), "count": len(found), "matches": found}


def _require_small_groups(match: RegexMatch, pattern: RegexPattern) -> None:
    """Raise `NodeError` for a match whose groups have more than ten million characters together."""
    characters = sum(match.end(group) - match.start(group) for group in range(pattern.groups + 1))
    if characters > output_sizes.MAXIMUM_BYTES:
        message = f"The groups of one match have more than {output_sizes.MAXIMUM_BYTES:,} characters"
        raise NodeError(message, code="output-too-large")


def _describe_match(match: RegexMatch) -> Json:
    return {
        "text": match.group(),
        "start": match.start(),
        "end": match.end(),
        "groups": list(match.groups()),
        "named": cast("dict[str, Json]", match.groupdict()),
    }


def _replace_matches(pattern: RegexPattern, text: str, maximum: int, replacement: str) -> Json:
    fill = _replacement_writer(pattern, replacement)
    size = output_sizes.OutputSize("The replacements")
    pieces: list[str] = []
    end = 0
    for match in _find_matches(pattern, text, maximum):
        filled = fill(match)
        size.add(filled)
        pieces += [text[end : match.start()], filled]
        end = match.end()
    count = len(pieces) // 2
    return {"found": count > 0, "count": count, "text": "".join([*pieces, text[end:]])}


def _replacement_writer(pattern: RegexPattern, replacement: str) -> Callable[[RegexMatch], str]:
    """Return a function that returns the text which replaces a match: with `$1` and `${name}` filled in, and `$` for
    `$$`.

    A group that took no part in the match is empty. Raises `NodeError` for a group that the pattern doesn't have.
    """
    parts: list[str] = []
    groups: list[int | str] = []
    end = 0
    for reference in GROUP_REFERENCE.finditer(replacement):
        dollar, number, name = reference.groups()
        before = replacement[end : reference.start()]
        end = reference.end()
        if dollar:
            parts.append(before + "$")
            groups.append("")
            continue
        parts.append(before)
        groups.append(_group_number(pattern, number or name))
    rest = replacement[end:]

    def fill(match: RegexMatch) -> str:
        filled = [
            part + ((match[group] or "") if group != "" else "")
            for part, group in zip(parts, groups, strict=True)
        ]
        return "".join([*filled, rest])

    return fill


def _group_number(pattern: RegexPattern, reference: str) -> int | str:
    if reference.isdecimal() and int(reference) <= pattern.groups:
        return int(reference)
    if reference in pattern.groupindex:
        return reference
    known = ", ".join(["0", *map(str, range(1, min(pattern.groups, 9) + 1)), *pattern.groupindex])
    message = f"`replacement` names the group {reference}: `pattern` has {known[:200]}"
    raise NodeError(message, code="unknown-group")


def _split_text(pattern: RegexPattern, text: str, maximum: int) -> Json:
    parts: list[Json] = []
    end = 0
    for match in _find_matches(pattern, text, maximum):
        parts.append(text[end : match.start()])
        end = match.end()
    return {"found": bool(parts), "count": len(parts), "parts": [*parts, text[end:]]}
