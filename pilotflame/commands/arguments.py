"""Arguments and options that several commands have, and values that they read from files."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from typer import Argument, Option

from pilotflame.command_error import CommandError

WorkflowArgument: TypeAlias = Annotated[
    str, Argument(metavar="WORKFLOW", help="Id or exact name of the workflow.")
]
ExecutionArgument: TypeAlias = Annotated[str, Argument(metavar="EXECUTION", help="Id of the execution.")]
ExecutionsArgument: TypeAlias = Annotated[
    list[str], Argument(metavar="EXECUTION...", help="Ids of executions.")
]
LimitOption: TypeAlias = Annotated[int, Option("--limit", min=1, help="Number of entries.")]
AllOption: TypeAlias = Annotated[bool, Option("--all", help="List every entry.")]
YesOption: TypeAlias = Annotated[bool, Option("--yes", "-y", help="Do not ask.")]
KeyOption: TypeAlias = Annotated[
    str | None,
    Option("--idempotency-key", help="Text that makes the command safe to repeat.", show_default=False),
]


def read_text(given: str, option: str) -> str:
    """Return the text of an argument itself, or for `@file` that of the file; `@-` and `-` read standard input.

    `option` names the option in errors. Raises `CommandError` for a file that isn't UTF-8, and `OSError`.
    """
    if given in {"-", "@-"}:
        return sys.stdin.read()
    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CommandError(f"{option}: {given[1:]} is not a text file in UTF-8") from error


def read_json(given: str, option: str) -> Any:  # noqa: ANN401 - any JSON
    """Return JSON that is given directly, as @file, or as @- for standard input.

    Raises `CommandError` for invalid JSON, which names `option`, and `OSError`.
    """
    try:
        return json.loads(read_text(given, option))
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{option} is not valid JSON: {error}") from error


def read_object(given: str, option: str) -> dict[str, Any]:
    """Return a JSON object that is given directly, as @file, or as @- for standard input.

    Raises `CommandError` for anything else, and `OSError`.
    """
    found = read_json(given, option)
    if not isinstance(found, dict):
        raise CommandError(f"{option} must be a JSON object")
    return found


def read_pairs(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """Return the pairs of a repeated option `key=value`, of a repeated key the last one; empty for None.

    Raises `CommandError` for a text without a key or `=`.
    """
    pairs = {}
    for one in given or ():
        key, separator, value = one.partition("=")
        if not separator or not key:
            raise CommandError(f"{option} must look like key=value, not {one!r}")
        pairs[key] = value
    return pairs


def confirm(question: str, *, is_confirmed: bool) -> None:
    """Ask the user before something that can't be undone, and abort the command unless the answer is yes.

    Nothing is asked if `is_confirmed`, as by `--yes`. Raises `CommandError` without a terminal.
    """
    if is_confirmed:
        return
    if not sys.stdin.isatty():
        raise CommandError(f"{question} Add --yes to confirm")
    import typer

    typer.confirm(question, abort=True, err=True)
