"""Settings that every process reads from the environment, once: `PILOTFLAME_` and the name of the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

MIN_SECRET_LENGTH = 32


class InvalidSettings(ValueError):
    """A process can't start like this; the text says which variable to mend, and how."""


def _sqlite_in(data: dict[str, Any]) -> str:
    return f"sqlite:///{data['data_dir']}/pilotflame.db"


class Settings(BaseSettings):
    """What all processes share; each has a subclass with what is its own."""

    model_config = SettingsConfigDict(env_prefix="PILOTFLAME_", frozen=True, extra="ignore")

    data_dir: Path = Field(default=Path(".pilotflame"), description="Folder of everything kept on disk.")
    database_url: str = Field(
        default_factory=_sqlite_in,
        repr=False,
        description=(
            "`sqlite:///path` or `postgresql://user:password@host/database`; a file in the data folder unless set."
        ),
    )
    redis_url: str | None = Field(
        default=None,
        repr=False,
        description="`redis://host:6379/0`. Only `pilotflame dev` does without: it keeps its messages in the process.",
    )
    secret_key: SecretStr | None = Field(
        default=None,
        description="At least 32 random characters, the same in every process: API keys are hashed with it.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least that is logged: `debug`, `info`, `warning` or `error`."
    )

    @property
    def secret(self) -> bytes:
        """The secret that keys are hashed with; raises `InvalidSettings` where there is none, or hardly one."""
        text = self.secret_key.get_secret_value() if self.secret_key else ""
        if len(text) < MIN_SECRET_LENGTH:
            raise InvalidSettings(
                f"PILOTFLAME_SECRET_KEY must hold at least {MIN_SECRET_LENGTH} random characters; make some with: "
                "python3 -c 'import secrets; print(secrets.token_urlsafe(48))'"
            )
        return text.encode()

    def check_for_production(self) -> None:
        """Raise `InvalidSettings` for what only `pilotflame dev` does without."""
        _ = self.secret
        if self.redis_url is None:
            raise InvalidSettings("PILOTFLAME_REDIS_URL is not set: only `pilotflame dev` does without Redis")
