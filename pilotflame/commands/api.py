"""Command `api`: one request to any path of the API."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from typer import Argument, Option

from pilotflame.command_error import CommandError
from pilotflame.commands.arguments import KeyOption, read_json, read_pairs
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import OutputFormat, show_value
from pilotflame.commands.server_connection import connect

app = new_noun("Send one request to the API.")
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")
PREFIX = "/api/v1"


@app.command("api")
def send_request(
    parts: Annotated[
        list[str],
        Argument(
            metavar="[METHOD] PATH",
            help="Method, GET by default or POST with a body, and path, with or without /api/v1.",
        ),
    ],
    given: Annotated[
        str | None, Option("--input", help="Body as JSON, @file or @- for standard input.")
    ] = None,
    field: Annotated[
        list[str] | None,
        Option(
            "--field", "-f", help="Field of the body as key=value, the value JSON or text; may be repeated."
        ),
    ] = None,
    query: Annotated[
        list[str] | None, Option("--query", "-q", help="Query parameter as key=value; may be repeated.")
    ] = None,
    idempotency_key: KeyOption = None,
    output: Annotated[OutputFormat, Option("--output", "-o", help="json or yaml.")] = OutputFormat.JSON,
) -> None:
    """Send a request to the API with the key of the profile, and print the answer.

    For example `pilotflame api GET /workflows -q status=active`.
    """
    method, path = _method_and_path(parts, has_body=given is not None or bool(field))
    body: Any = None if given is None else read_json(given, "--input")
    if field:
        body = {
            **(body or {}),
            **{key: _parse_value(text) for key, text in read_pairs(field, "--field").items()},
        }
    answer = connect().request(
        method,
        path,
        json=body,
        query=read_pairs(query, "--query"),
        idempotency_key=idempotency_key,
    )
    if answer is not None:
        show_value(answer, OutputFormat.YAML if output is OutputFormat.YAML else OutputFormat.JSON)


def _method_and_path(parts: list[str], *, has_body: bool) -> tuple[str, str]:
    """Return method and path of a request from the arguments; raises `CommandError`.

    The method is GET, or POST with a body, by default; `/api/v1` is added to a path without it, except to `/healthz`,
    `/readyz` and `/openapi.json`.
    """
    method = "POST" if has_body else "GET"
    match parts:
        case [path]:
            pass
        case [given, path] if given.upper() in METHODS:
            method = given.upper()
        case _:
            raise CommandError(f"`pilotflame api` takes a method of {', '.join(METHODS)}, and a path")
    path = path if path.startswith("/") else f"/{path}"
    has_prefix = path.startswith((f"{PREFIX}/", "/healthz", "/readyz", "/openapi.json"))
    return method, path if has_prefix else PREFIX + path


def _parse_value(text: str) -> object:
    """Return the value of an argument: parsed if it is JSON, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text


@app.command("completion")
def print_completion(
    shell: Annotated[str, Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print a script that completes commands and options: source <(pilotflame completion bash)."""
    from typer._completion_shared import get_completion_script

    if shell not in {"bash", "zsh", "fish"}:
        raise CommandError(f"There is completion for bash, zsh and fish, not for {shell!r}")
    script = get_completion_script(prog_name="pilotflame", complete_var="_PILOTFLAME_COMPLETE", shell=shell)
    typer.echo(script)
