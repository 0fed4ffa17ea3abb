"""Commands for workers that run your own node types."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pilotflame.commands import server_connection
from pilotflame.commands.arguments import AllOption, LimitOption
from pilotflame.commands.nouns import new_noun
from pilotflame.commands.output import FormatOption, OutputFormat, remark, show_list, take

app = new_noun("Run, list and drain workers of your own node types.")
COLUMNS = {
    "Id": "id",
    "Name": "name",
    "Present": "present",
    "Draining": "draining",
    "Tasks": "tasks",
    "Pools": "pools",
    "Sdk": "sdk",
    "Seen": "lastSeenAt",
}
FileArgument = Annotated[Path, Argument(metavar="FILE", help="Python file with `worker = Worker(...)`.")]


@app.command("list")
def list_workers(
    limit: LimitOption = 100, every: AllOption = False, output: FormatOption = OutputFormat.TABLE
) -> None:
    """List the workers of the organization, the last seen first."""
    found = take(server_connection.connect().workers.iterate(), limit, all_items=every)
    show_list(found, output, COLUMNS)


@app.command("drain")
def drain_worker(worker: Annotated[str, Argument(metavar="WORKER", help="Id of the worker.")]) -> None:
    """Ask a worker to end: it gets no more tasks, and ends with those that it has."""
    server_connection.connect().workers.drain(worker)


@app.command("run")
def run_worker(
    file: FileArgument,
    register: Annotated[
        bool, Option("--register", help="Add the node types first; needs the scope nodes:write.")
    ] = False,
) -> None:
    """Run the worker of a file until SIGTERM, then let its tasks end."""
    from pilotflame import worker_files

    _use_profile()
    (worker, *_) = worker_files.load_workers(file)
    if register:
        for added in worker.register():
            remark(f"{added} is registered")
    worker.run()


@app.command("dev")
def develop(file: FileArgument) -> None:
    """Register the node types of a file, run its worker, and do both again whenever Python code beside it changes."""
    from pilotflame import worker_files

    _use_profile()
    worker_files.run_again_after_changes(file, remark)


def _use_profile() -> None:
    """Set the profile of the command in the environment of this process, for the worker and its child processes.

    It takes the place of the variables with an address and a key. Does nothing without a profile on the command line.
    """
    import os

    if server_connection.chosen_profiles:
        os.environ["PILOTFLAME_PROFILE"] = server_connection.chosen_profiles[-1]
        for name in ("PILOTFLAME_URL", "PILOTFLAME_API_KEY"):
            os.environ.pop(name, None)
