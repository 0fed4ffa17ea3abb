"""Commands for the secret that signs callbacks and webhooks of the organization."""

from __future__ import annotations

from pilotflame_sdk import NotFound

from pilotflame.commands.arguments import YesOption, confirm
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, say, show_object
from pilotflame.commands.server_connection import connect

app = new_noun("Show or replace the secret that signs callbacks and webhooks of the organization.")


@app.command("get")
def get_secret(output: FormatOption = OutputFormat.JSON) -> None:
    """Print the last characters and the age of the signing secret; the secret itself is shown only when it is made."""
    show_object(dict(connect().signing_secret.get()), output, key="hint")


@app.command("replace")
def replace_secret(yes: YesOption = False) -> None:
    """Make a new signing secret and print it; an earlier one signs beside it for 24 hours."""
    client = connect()
    try:
        hint = client.signing_secret.get()["hint"]
    except NotFound:
        pass
    else:
        confirm(f"Replace the signing secret that ends with {hint}?", is_confirmed=yes)
    say(client.signing_secret.replace()["secret"])
