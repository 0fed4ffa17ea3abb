"""Commands that run processes of the server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from pilotflame import server_processes
from pilotflame.command_error import CommandError
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.workflow_definitions import read_definition

app = new_noun("Run processes of the server.")


@app.command("dev")
def run_every_role(
    host: Annotated[str | None, Option(help="Address to listen on.", show_default="127.0.0.1")] = None,
    port: Annotated[
        int | None, Option(help="Port to listen on; 0 chooses a free one.", show_default="8000")
    ] = None,
    example: Annotated[
        Path | None,
        Option(help="YAML or JSON file of a workflow to load into a new database."),
    ] = None,
) -> None:
    """Run every role in one process, without other services."""
    from models.settings import ServerSettings
    from pilotflame import log_lines

    definition = None if example is None else read_definition(example)
    lines = server_processes.begin(
        ServerSettings(), log_lines.as_text if sys.stdout.isatty() else log_lines.as_json
    )
    from pilotflame import dev

    given = {"host": host, "port": port}
    dev.serve(
        {name: value for name, value in given.items() if value is not None},
        lines,
        definition,
        _inputs_of(example),
    )


@app.command("server")
def run_server(
    has_deployer: Annotated[bool, Option("--deployer", help="Run a deployer too.")] = False,
) -> None:
    """Run gateway, worker and scheduler of one machine, and restart them when they end."""
    server_processes.run_server(has_deployer=has_deployer)


for _name, _run in server_processes.PROCESSES.items():
    app.command(_name)(_run)


@app.command()
def smtp() -> None:
    """Receive mails for e-mail triggers by SMTP or LMTP."""
    from bridge.smtp_settings import SmtpListenerSettings

    settings = SmtpListenerSettings()
    server_processes.begin_log(settings)
    try:
        from bridge import smtp_listener
    except ModuleNotFoundError as error:
        raise CommandError("The SMTP listener needs a library: pip install 'pilotflame[smtp]'") from error
    try:
        smtp_listener.serve(settings)
    except OSError as error:
        raise CommandError(
            f"The SMTP listener can't listen at PILOTFLAME_SMTP_HOST and PILOTFLAME_SMTP_PORT: {error}"
        ) from error


def _inputs_of(example: Path | None) -> Path | None:
    """Return the inputs file `NAME-input.json` beside an example, such as `NAME.yaml`;
    None without such a file or an example.
    """
    inputs = None if example is None else example.with_name(f"{example.stem}-input.json")
    return inputs if inputs is not None and inputs.exists() else None
