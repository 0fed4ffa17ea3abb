"""Command `pilotflame`: starts a process of the server, or loads the command line for everything else.

A process without options needs no parser, whose import is a tenth of its start and 5 MB of its memory.
"""

from __future__ import annotations

import sys

from pilotflame import command_error, server_processes


def main() -> None:
    """Run the command that `sys.argv` names: a server process directly, any other by the command line interface.

    So server processes do not load the command line library.
    """
    match sys.argv[1:]:
        case [name] if name in server_processes.PROCESSES:
            with command_error.print_user_errors():
                server_processes.run_process(name)
        case _:
            from pilotflame.cli import app

            app()
