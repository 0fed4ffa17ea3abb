"""Unknown environment variables with the prefix of settings: misspelled, or of another version."""

from __future__ import annotations

from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Final

from engine import name_suggestions

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from pydantic_settings import BaseSettings

PREFIX: Final = "PILOTFLAME_"
OF_COMMANDS: Final = frozenset(
    f"PILOTFLAME_{name}" for name in ("URL", "API_KEY", "PROFILE", "CONFIG", "TEST_URL", "TEST_API_KEY")
)
"""Variables of client commands and of the SDK, known without loading the settings of every process."""
_SERVICE_HOST: Final = "_SERVICE_HOST"
"""Kubernetes describes each Service of a namespace in variables; those of Pilotflame's Services have the same prefix.
"""


def find_unknown(
    environment: Iterable[str], own: type[BaseSettings] | None = None
) -> Mapping[str, list[str]]:
    """Return the variables with the prefix of settings that no process reads, each with the names of similar settings.

    `environment` has the names of the variables. Those that Kubernetes sets for services are skipped. The settings of
    `own` are compared first; modules of other processes are only loaded if a variable is not among these.
    """
    given = sorted(name for name in environment if name.upper().startswith(PREFIX))
    links = tuple(
        name.removesuffix(_SERVICE_HOST) + kind
        for name in given
        if name.endswith(_SERVICE_HOST)
        for kind in ("_SERVICE_", "_PORT")
    )
    left = [name for name in given if name.upper() not in OF_COMMANDS and not name.startswith(links)]
    for kind in chain(() if own is None else (own,), _load_kinds()):
        if not left:
            break
        known = _list_variables(kind)
        left = [name for name in left if name.upper() not in known]
    return {name: _suggest_settings(name) for name in left}


def _suggest_settings(name: str) -> list[str]:
    """Return the names of settings that are similar to a variable, compared without the common prefix."""
    bare = [one.removeprefix(PREFIX) for one in sorted(known_variables())]
    return [PREFIX + one for one in name_suggestions.suggest_names(name.upper().removeprefix(PREFIX), bare)]


def warning_text(name: str, meant: Iterable[str]) -> str:
    """Return the warning about an unknown variable, with the similar settings; it doesn't contain the value."""
    suggestion = " or ".join(meant)
    return f"{name} is not a setting" + (f": did you mean {suggestion}?" if suggestion else "")


@cache
def known_variables() -> frozenset[str]:
    """Return the names of the variables of all processes and commands, which often share one environment."""
    return OF_COMMANDS | frozenset(name for kind in _load_kinds() for name in _list_variables(kind))


def _list_variables(kind: type[BaseSettings]) -> frozenset[str]:
    return frozenset(f"{PREFIX}{field}".upper() for field in kind.model_fields)


def _load_kinds() -> Iterator[type[BaseSettings]]:
    """Yield the settings of each process, bridge and the mail listener, loading the module of each only when needed."""
    # Imported on demand, so that no process loads the settings of every other one; bridges are the rarest.
    from gateway.settings import GatewaySettings

    yield GatewaySettings
    from workers.settings import WorkerSettings

    yield WorkerSettings
    from scheduler.settings import SchedulerSettings

    yield SchedulerSettings
    from workers.deployer.settings import DeployerSettings

    yield DeployerSettings
    from runner.settings import RunnerSettings

    yield RunnerSettings
    from bridge.settings import RabbitmqBridgeSettings, RedisBridgeSettings, SqsBridgeSettings

    yield from (RedisBridgeSettings, SqsBridgeSettings, RabbitmqBridgeSettings)
    from bridge.smtp_settings import SmtpListenerSettings

    yield SmtpListenerSettings
