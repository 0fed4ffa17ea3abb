"""Commands for tool servers, whose tools agents call once a person has accepted their definitions."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer import Argument, Option

from pilotflame import exit_codes
from pilotflame.command_error import CommandError
from pilotflame.commands.arguments import AllOption, LimitOption, YesOption, confirm
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import (
    FormatOption,
    OutputFormat,
    remark_warnings,
    show_list,
    show_object,
    take,
)
from pilotflame.commands.server_connection import connect

app = new_noun("Manage servers of the Model Context Protocol (MCP), whose tools agents call.")
SERVERS = "/api/v1/ai/tool-servers"
COLUMNS = {
    "Id": "id",
    "Name": "name",
    "Address": "url",
    "Accepted": "toolCounts.accepted",
    "New": "toolCounts.new",
    "Changed": "toolCounts.changed",
    "Listed": "listedAt",
}
TOOL_COLUMNS = {
    "Tool": "name",
    "Status": "status",
    "Effect": "accepted.effect",
    "Changed": "changedPaths",
    "Hash": "offered.hash",
    "Description": "offered.description",
}
ServerArgument = Annotated[str, Argument(metavar="SERVER", help="Id or exact name of the tool server.")]
ToolArgument = Annotated[str, Argument(metavar="TOOL", help="Name of the tool.")]


@app.command("list")
def list_servers(
    limit: LimitOption = 100, every: AllOption = False, output: FormatOption = OutputFormat.TABLE
) -> None:
    """List the tool servers that the key may use, each with its number of accepted, new and changed tools."""
    show_list(take(connect().iterate(SERVERS, "toolServers", {}), limit, all_items=every), output, COLUMNS)


@app.command("create")
def create_server(
    name: Annotated[str, Argument(help="Name of the tool server.")],
    url: Annotated[str, Option("--url", help="Address to which messages are posted.")],
    key_env: Annotated[str | None, Option("--key-env", help="Variable that holds its key.")] = None,
    key_header: Annotated[
        str | None, Option("--key-header", help="Header of the key, in place of Authorization: Bearer.")
    ] = None,
) -> None:
    """Store a tool server without contacting it, and print its id."""
    body: dict[str, Any] = {"name": name, "url": url}
    if key_env is not None:
        if key_env not in os.environ:
            raise CommandError(f"{key_env} is not set", exit_codes.USAGE)
        body["apiKey"] = os.environ[key_env]
    if key_header is not None:
        body["keyHeader"] = key_header
    created = connect().request("POST", SERVERS, json=body, is_keyed=True)
    remark_warnings(created)
    typer.echo(created["dataSourceId"])


@app.command("refresh")
def refresh_tools(server: ServerArgument, output: FormatOption = OutputFormat.TABLE) -> None:
    """Ask a tool server for its tools, and list them; accepts none, and exits with 1 unless it answers."""
    found = connect().request("POST", f"{SERVERS}/{find_server(server)}/refresh")
    if not found["ok"]:
        raise CommandError(str(found["message"]), exit_codes.REFUSED)
    show_list(found["toolServer"]["tools"], output, TOOL_COLUMNS, key="name")


@app.command("tools")
def list_tools(server: ServerArgument, output: FormatOption = OutputFormat.TABLE) -> None:
    """List the tools of a server: accepted or not, with their hashes, and the parts that have changed since."""
    found = connect().request("GET", f"{SERVERS}/{find_server(server)}")
    show_list(found["tools"], output, TOOL_COLUMNS, key="name")


@app.command("tool")
def get_tool(server: ServerArgument, tool: ToolArgument, output: FormatOption = OutputFormat.JSON) -> None:
    """Print both definitions of a tool: the accepted one, and that of the server."""
    tools = connect().request("GET", f"{SERVERS}/{find_server(server)}")["tools"]
    found = next((one for one in tools if one["name"] == tool), None)
    if found is None:
        raise CommandError(f"The tool server has no tool {tool!r}: refresh it", exit_codes.REFUSED)
    show_object(found, output, key="name")


@app.command("accept")
def accept_tool(
    server: ServerArgument,
    tool: ToolArgument,
    content_hash: Annotated[
        str, Argument(metavar="HASH", help="Hash of the definition that you have read, as `tools` lists it.")
    ],
    reads: Annotated[
        bool, Option("--read", help="Its calls change nothing: no approvals, repeated after failures.")
    ] = False,
) -> None:
    """Let workflows call a tool by the definition with this hash; refused if the server lists another one."""
    accepted = {"name": tool, "hash": content_hash, "effect": "read" if reads else "write"}
    connect().request("POST", f"{SERVERS}/{find_server(server)}/accept", json={"tools": [accepted]})


@app.command("withdraw")
def withdraw_tool(server: ServerArgument, tool: ToolArgument) -> None:
    """Refuse further calls of an accepted tool."""
    connect().request("POST", f"{SERVERS}/{find_server(server)}/accept", json={"withdrawn": [tool]})


@app.command("delete")
def delete_server(
    server: ServerArgument,
    force: Annotated[bool, Option("--force", help="Even if workflows name it.")] = False,
    yes: YesOption = False,
) -> None:
    """Delete a tool server with its key."""
    confirm(f"Delete the tool server {server} with its key?", is_confirmed=yes)
    query = {"force": "true"} if force else None
    connect().request("DELETE", f"{SERVERS}/{find_server(server)}", query=query)


def find_server(id_or_name: str) -> str:
    """Return the id of a tool server: an id (`ds_…`) is returned unchecked,
    else the name, with or without `@`, is looked up.

    Raises `CommandError` unless exactly one has the name.
    """
    if id_or_name.startswith("ds_"):
        return id_or_name
    named = id_or_name.removeprefix("@")
    found = [str(one["id"]) for one in connect().iterate(SERVERS, "toolServers", {}) if one["name"] == named]
    if len(found) != 1:
        count = "no tool server" if not found else f"{len(found)} tool servers"
        raise CommandError(f"There is {count} {named!r}", exit_codes.REFUSED)
    return found[0]
