"""Migration of a database in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

MIGRATE_COMMAND: Final = (sys.executable, "-m", "pilotflame", "migrate")


def begin_migration(database_url: str) -> subprocess.Popen[bytes]:
    """Start the migration of a database in another process, and return that without waiting.

    Alembic would stay in the memory of this one.
    """
    environment = os.environ | {"PILOTFLAME_DATABASE_URL": database_url}
    return subprocess.Popen(MIGRATE_COMMAND, env=environment, stdout=subprocess.DEVNULL)  # noqa: S603 - this program itself
