"""Commands for node types: the catalog, and types of the organization whose code runs in its workers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Argument, Option

from pilotflame.commands.arguments import AllOption, LimitOption, YesOption, confirm
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, show_object, take
from pilotflame.commands.server_connection import connect

app = new_noun("Read the catalog of node types, and add your own.")
COLUMNS = {"Type": "type", "Version": "version", "Category": "category", "Name": "name"}
PATH = "/api/v1/workflow-nodes"
TypeArgument = Annotated[str, Argument(metavar="TYPE", help="Node type, such as filter or acme/resize.")]


@app.command("list")
def list_types(
    search: Annotated[str | None, Option(help="Text in type, name or description.")] = None,
    category: Annotated[str | None, Option(help="Category of the types.")] = None,
    limit: LimitOption = 100,
    every: AllOption = False,
    output: FormatOption = OutputFormat.TABLE,
) -> None:
    """List the node types."""
    query = {"search": search, "category": category}
    show_list(
        take(connect().iterate(PATH, "nodes", query), limit, all_items=every), output, COLUMNS, key="type"
    )


@app.command("get")
def get_type(
    node_type: TypeArgument,
    version: Annotated[str | None, Option(help="Version of a custom type.", show_default="newest")] = None,
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Print the schema of the config of a built-in type, or the whole document of a custom type."""
    from pilotflame_sdk.request_coding import quote_type

    path = f"{PATH}/{quote_type(node_type)}"
    is_custom = "/" in node_type
    found = connect().request(
        "GET", path if is_custom else f"{path}/schema", query={"version": version if is_custom else None}
    )
    show_object(found, output, key="type")


@app.command("versions")
def list_versions(node_type: TypeArgument, output: FormatOption = OutputFormat.TABLE) -> None:
    """List the versions of a custom type."""
    from pilotflame_sdk.request_coding import quote_type

    found: dict[str, Any] = connect().request("GET", f"{PATH}/{quote_type(node_type)}/versions")
    columns = {"Version": "version", "Deprecated": "deprecated", "Created": "createdAt"}
    show_list(found["versions"], output, columns, key="version")


@app.command("apply")
def apply_types(
    files: Annotated[
        list[Path], Argument(metavar="FILE...", help="Python files with a worker, or JSON or YAML documents.")
    ],
) -> None:
    """Add the node types of workers or documents to the organization; needs the scope nodes:write.

    A Python file is executed up to `if __name__ == "__main__"`. The same version again changes nothing; changed
    content needs a new version.
    """
    from pilotflame import worker_files

    client = connect()
    for file in files:
        for document in worker_files.read_documents(file):
            client.request("POST", PATH, json=document)
            typer.echo(f"{document['type']} {document['version']}")


@app.command("delete")
def delete_type(
    node_type: TypeArgument,
    version: Annotated[str, Option(help="Version to delete.")],
    yes: YesOption = False,
) -> None:
    """Delete a version of a custom type that no workflow uses."""
    from pilotflame_sdk.request_coding import quote_type

    confirm(f"Delete {node_type} {version}?", is_confirmed=yes)
    connect().request("DELETE", f"{PATH}/{quote_type(node_type)}", query={"version": version})
