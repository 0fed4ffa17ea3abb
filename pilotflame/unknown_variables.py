"""Environment variables that look like settings and are none: misspelt, or of another version."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

from engine import name_suggestions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from pydantic_settings import BaseSettings

PREFIX: Final = "PILOTFLAME_"
OF_COMMANDS: Final = frozenset({"PILOTFLAME_URL", "PILOTFLAME_API_KEY"})
"""What commands that talk to a server need: known without loading the settings of every process."""
_SERVICE_HOST: Final = "_SERVICE_HOST"
"""Kubernetes describes each Service of a namespace in variables; ours begin like settings."""


def find_unknown(environment: Iterable[str]) -> Mapping[str, list[str]]:
    """Return the variables that begin like a setting and are none, each with the settings that it may mean."""
    given = [
        name for name in environment if name.upper().startswith(PREFIX) and name.upper() not in OF_COMMANDS
    ]
    links = tuple(
        name.removesuffix(_SERVICE_HOST) + kind
        for name in given
        if name.endswith(_SERVICE_HOST)
        for kind in ("_SERVICE_", "_PORT")
    )
    return {
        name: _meant(name)
        for name in sorted(given)
        if name.upper() not in known_variables() and not name.startswith(links)
    }


def _meant(name: str) -> list[str]:
    """Return the settings that a variable may mean: the beginning that all share makes none of them alike."""
    bare = [one.removeprefix(PREFIX) for one in sorted(known_variables())]
    return [PREFIX + one for one in name_suggestions.suggest_names(name.upper().removeprefix(PREFIX), bare)]


def warning_text(name: str, meant: Iterable[str]) -> str:
    """Return the sentence about a variable; its value is nobody's business."""
    hint = " or ".join(meant)
    return f"{name} is no setting" + (f": did you mean {hint}?" if hint else "")


@cache
def known_variables() -> frozenset[str]:
    """Return the variables of all processes: they often share one environment."""
    return frozenset(f"{PREFIX}{field}".upper() for kind in _kinds() for field in kind.model_fields)


def _kinds() -> Iterable[type[BaseSettings]]:
    # Loaded only where somebody looks: each command pays for its own settings alone.
    from bridge.settings import RabbitmqBridgeSettings, RedisBridgeSettings, SqsBridgeSettings
    from gateway.settings import GatewaySettings
    from runner.settings import RunnerSettings
    from scheduler.settings import SchedulerSettings
    from workers.deployer.settings import DeployerSettings
    from workers.settings import WorkerSettings

    return (
        *(GatewaySettings, WorkerSettings, SchedulerSettings, DeployerSettings, RunnerSettings),
        *(RedisBridgeSettings, SqsBridgeSettings, RabbitmqBridgeSettings),
    )
