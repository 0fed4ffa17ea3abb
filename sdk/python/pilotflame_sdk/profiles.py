"""Addresses and keys of servers: from arguments, from the environment, or from a profile in a file of the user.

The file is `$PILOTFLAME_CONFIG`, or `pilotflame/profiles.json` in the folder for configurations. Only its owner can
read it. `pilotflame login` writes it.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkstemp
from typing import Final
from urllib.parse import urlsplit

from pilotflame_sdk.errors import ConfigurationError, LoginRequired

DEFAULT_URL: Final = "http://127.0.0.1:8000"
OWNER_ONLY: Final = 0o600


@dataclass(frozen=True)
class ServerAddress:
    """Address and API key of a server."""

    url: str
    api_key: str = field(repr=False)
    """Hidden in representations, so that no log shows it."""


@dataclass(frozen=True)
class Profiles:
    """Named servers of a user."""

    current: str | None = None
    servers: Mapping[str, ServerAddress] = field(default_factory=dict)


def profiles_path() -> Path:
    """Return the path of the file with the user's profiles; the file may not exist.

    It is `PILOTFLAME_CONFIG`, else `pilotflame/profiles.json` in `XDG_CONFIG_HOME` or `~/.config`.
    """
    if named := os.environ.get("PILOTFLAME_CONFIG"):
        return Path(named)
    folder = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(folder) / "pilotflame" / "profiles.json"


def read_profiles() -> Profiles:
    """Return the stored profiles of the user; empty without a file.

    Raises `ConfigurationError` for an unreadable or malformed file.
    """
    path = profiles_path()
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        servers = {
            str(name): ServerAddress(str(one["url"]), str(one["apiKey"]))
            for name, one in stored["profiles"].items()
        }
        return Profiles(stored.get("current"), servers)
    except FileNotFoundError:
        return Profiles()
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigurationError(
            f"{path} is no file with profiles ({error}): run `pilotflame login`"
        ) from error


def write_profiles(profiles: Profiles) -> Path:
    """Store the profiles, readable by their owner alone, and return the path of the file.

    The file is replaced as a whole; its folder is created. Raises `OSError`.
    """
    path = profiles_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    stored = {
        "current": profiles.current,
        "profiles": {name: {"url": one.url, "apiKey": one.api_key} for name, one in profiles.servers.items()},
    }
    # A new file with these rights from its beginning: an interrupted write leaves the old one.
    descriptor, written = mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            os.fchmod(descriptor, OWNER_ONLY)
            json.dump(stored, file, indent=2)
        Path(written).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(written).unlink()
        raise
    return path


def find_server(
    url: str | None = None, api_key: str | None = None, *, profile: str | None = None
) -> ServerAddress:
    """Return address and API key of the server to use; raises `ConfigurationError`, `LoginRequired` without a key.

    Arguments come before PILOTFLAME_URL and PILOTFLAME_API_KEY, and these before the profile that `profile`,
    PILOTFLAME_PROFILE or `pilotflame profile use` names. The key of a profile is sent to its own address
    alone. The default address is `http://127.0.0.1:8000`.
    """
    url = url or (None if profile else os.environ.get("PILOTFLAME_URL")) or None
    api_key = api_key or (None if profile else os.environ.get("PILOTFLAME_API_KEY")) or None
    stored = None if url and api_key else _find_profile(profile)
    if stored is not None and (url is None or url.rstrip("/") == stored.url.rstrip("/")):
        url, api_key = url or stored.url, api_key or stored.api_key
    url = (url or DEFAULT_URL).rstrip("/")
    if not _is_server_url(url):
        raise ConfigurationError(
            f"PILOTFLAME_URL must begin with http:// or https:// and a host, not be {url!r}"
        )
    if not api_key:
        raise LoginRequired(
            "Set PILOTFLAME_API_KEY to an API key of the server, or store one with `pilotflame login`"
        )
    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise ConfigurationError("PILOTFLAME_API_KEY may contain only visible ASCII characters")
    return ServerAddress(url, api_key)


def _is_server_url(url: str) -> bool:
    """Return whether a URL has a host, and a port only from 0 to 65535."""
    try:
        parts = urlsplit(url)
        _ = parts.port  # it is parsed only here
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


def _find_profile(name: str | None) -> ServerAddress | None:
    """Return the profile with this name, else that of PILOTFLAME_PROFILE, else the current one; None without any.

    Raises `ConfigurationError` for a name that is not stored.
    """
    wanted = name or os.environ.get("PILOTFLAME_PROFILE")
    profiles = read_profiles()
    chosen = wanted or profiles.current
    found = profiles.servers.get(chosen or "")
    if wanted and found is None:
        known = ", ".join(sorted(profiles.servers)) or "none"
        raise ConfigurationError(f"There is no profile {wanted!r}; the stored ones are: {known}")
    return found
