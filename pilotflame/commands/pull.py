"""Command `pull`: the node types of an organization as a Python module."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from pilotflame import exit_codes
from pilotflame.command_error import CommandError
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import remark
from pilotflame.commands.server_connection import connect

app = new_noun("Write the node types of the organization as Python.")


@app.command("pull")
def pull(
    out: Annotated[
        Path | None, Option(metavar="FILE.py", help="File to write.", show_default="standard output")
    ] = None,
    check: Annotated[
        bool, Option("--check", help="Write nothing, and exit with 7 if the file differs.")
    ] = False,
) -> None:
    """Write a typed Python function for each node type of the organization, for workflows built in code.

    Custom node types are among them. The same catalog gives the same file.
    """
    from pilotflame_sdk import node_code

    if check and out is None:
        raise CommandError("--check needs the file: add --out FILE.py", exit_codes.USAGE)
    node_types = node_code.read_catalog(connect())
    text = node_code.write_module(node_types)
    if out is None:
        typer.echo(text, nl=False)
    elif not check:
        out.write_text(text, encoding="utf-8")
        remark(f"{out} has {len(node_types)} node types")
    elif not out.is_file() or out.read_text(encoding="utf-8") != text:
        remark(f"{out} differs from the catalog: run `pilotflame pull --out {out}`")
        raise typer.Exit(exit_codes.DIFFERENT)
