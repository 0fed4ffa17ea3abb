"""Commands for invitations: links by which people become members of the organization."""

from __future__ import annotations

from typing import Annotated, Literal

from typer import Argument, Option

from pilotflame.commands.arguments import AllOption, LimitOption
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, say, show_list, take
from pilotflame.commands.server_connection import connect

app = new_noun("Invite people to the organization.")
COLUMNS = {"Id": "id", "E-mail": "email", "Role": "role", "State": "state", "Expires": "expiresAt"}
SECONDS_PER_DAY = 86_400


@app.command("list")
def list_invitations(
    output: FormatOption = OutputFormat.TABLE, limit: LimitOption = 100, every: AllOption = False
) -> None:
    """List the invitations, without their links."""
    show_list(take(connect().invitations.iterate(), limit, all_items=every), output, COLUMNS)


@app.command("create")
def create_invitation(
    email: Annotated[str, Argument(help="Mail address of the person.")],
    role: Annotated[
        Literal["viewer", "member", "admin"],
        Option(help="Role; a viewer only reads, an admin manages the whole organization."),
    ] = "member",
    days: Annotated[
        int | None, Option(min=1, help="Days until the link expires.", show_default="as the server has it")
    ] = None,
) -> None:
    """Create an invitation and print its link; it can't be shown again."""
    seconds = None if days is None else days * SECONDS_PER_DAY
    say(connect().invitations.create(email=email, role=role, expires_in_seconds=seconds)["url"])


@app.command("revoke")
def revoke_invitation(
    invitation: Annotated[str, Argument(metavar="INVITATION", help="Id of the invitation.")],
) -> None:
    """Revoke an invitation; its link stops working."""
    connect().invitations.revoke(invitation)
