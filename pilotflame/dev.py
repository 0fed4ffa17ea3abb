"""Command `pilotflame dev`: locks its data folder, then runs every role in this process."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from concurrency import gc_tuning
from models.settings import ServerSettings
from pilotflame import data_dir
from pilotflame.command_error import CommandError
from pilotflame.log_lines import LineWriter
from pilotflame.migration_process import begin_migration

SHUTDOWN_SECONDS: Final = 3
"""Seconds to wait for open requests; handing off runs comes after it, and the whole stop takes 20 s at most."""


def serve(
    given: dict[str, Any],
    lines: LineWriter,
    example: Mapping[str, Any] | None = None,
    example_inputs: Path | None = None,
) -> None:
    """Run all roles until a stop signal; settings `given` on the command line override the environment.

    The data folder is locked, and a missing secret created. `example` is the definition of a workflow to store in a new
    database, with the file of its inputs. Raises `CommandError`, and pydantic's `ValidationError`.
    """
    gc_tuning.postpone_until_loaded()
    settings = ServerSettings()
    folder = settings.data_dir
    with data_dir.lock_folder(folder):
        migration = begin_migration(settings.database_url) if _is_new(settings) else None
        # Imported here, since the import takes about as long as the migration that runs meanwhile.
        from pilotflame import all_in_one

        secret_key = settings.secret_key or data_dir.secret_key(folder) or data_dir.make_secret_key(folder)
        shared: dict[str, Any] = {"secret_key": secret_key, "redis_url": None}
        roles = all_in_one.RoleSettings.build(shared, {**given, "shutdown_seconds": SHUTDOWN_SECONDS})
        with _open_listener(roles.gateway.host, roles.gateway.port) as listener:
            loaded = None if example is None else all_in_one.ExampleWorkflow(example, example_inputs)
            all_in_one.run_all_roles(roles, listener, migration, lines, loaded)


def _is_new(settings: ServerSettings) -> bool:
    """Return whether the server uses the default database in the data folder, and it does not exist yet."""
    return (
        data_dir.holds_database(settings)
        and not Path(settings.database_url.removeprefix("sqlite:///")).exists()
    )


def _open_listener(host: str, port: int) -> socket.socket:
    """Return a socket that listens at host and port; raises `CommandError` if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise CommandError(
            f"Port {port} of {host} is not available ({error.strerror}): choose another with --port"
        ) from error
