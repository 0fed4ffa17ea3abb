"""Settings of commands that use the database of this installation directly."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from models.settings import ServerSettings


def read_settings() -> ServerSettings:
    """Return the settings of the environment, for a command that uses the database of this machine directly.

    Without a configured secret, the default database uses the secret of the data folder. Raises pydantic's
    `ValidationError`.
    """
    from models.settings import ServerSettings
    from pilotflame import data_dir

    settings = ServerSettings()
    if settings.secret_key is not None or not data_dir.holds_database(settings):
        return settings
    return settings.model_copy(update={"secret_key": data_dir.secret_key(settings.data_dir)})
