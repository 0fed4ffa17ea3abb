"""Commands for node types."""

from __future__ import annotations

from typing import Annotated

from typer import Argument, Option

from pilotflame.commands.arguments import AllOption, LimitOption
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, show_list, show_object, take
from pilotflame.commands.server_connection import connect

app = new_noun("Read the catalog of node types.")
COLUMNS = {"Type": "type", "Version": "version", "Category": "category", "Name": "name"}


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
    found = take(connect().iterate("/api/v1/workflow-nodes", "nodes", query), limit, all_items=every)
    show_list(found, output, COLUMNS, key="type")


@app.command("get")
def get_type(
    node_type: Annotated[str, Argument(metavar="TYPE", help="Node type.")],
    output: FormatOption = OutputFormat.JSON,
) -> None:
    """Print the schema of the config of a node type."""
    from pilotflame_sdk.request_coding import quote_type

    found = connect().request("GET", f"/api/v1/workflow-nodes/{quote_type(node_type)}/schema")
    show_object(found, output, key="type")
