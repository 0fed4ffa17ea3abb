"""Deliberate damage to the server's processes, loaded by Python's start: `PILOTFLAME_FAULTS_WITHOUT` names its kind.

Each removes one mechanism of the promises, to show that the faults find its absence.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

STORE = "journal.postgresql.postgresql_store"
TASK_MOVES = "journal.tasks.task_moves"


def remove_fence(module: Any) -> None:  # noqa: ANN401 - a module of the server
    """Let workers write results under a claim of an execution that another one has followed."""
    fence = " AND execution.token = write.token\n"
    for statements in (module._RECORD, module._RECORD_ALONE):  # noqa: SLF001 - as above
        for key, statement in statements.items():
            assert fence in statement
            statements[key] = statement.replace(fence, "\n")


def remove_lease(module: Any) -> None:  # noqa: ANN401 - a module of the server
    """Let task workers report a task under a claim that another one has followed."""
    assert module.is_holder
    module.is_holder = lambda task, _lease: task.is_held


def remove_confirmation(module: Any) -> None:  # noqa: ANN401 - a module of the SDK
    """Let task workers begin the tasks of long polls without asking whether they still hold them."""
    module.FRESH_SECONDS = float("inf")


def remove_sweep(module: Any) -> None:  # noqa: ANN401 - a module of the server
    """Let the sweep find no execution whose worker is gone."""

    async def sweep(_store: object, _limit: int) -> object:
        return module.SweepResult(requeued=0, ended={}, due=0, has_pending=False)

    module.PostgreSQLStore.sweep = sweep


def remove_journal(module: Any) -> None:  # noqa: ANN401 - a module of the server
    """Return no committed results of nodes to a worker that takes over an execution."""

    async def spans(_store: object, keys: Sequence[Any]) -> dict[str, list[object]]:
        return {key.execution_id: [] for key in keys}

    module.PostgreSQLStore.spans = spans


DAMAGE: dict[str, dict[str, Callable[[Any], None]]] = {
    "fence": {STORE: remove_fence},
    "lease": {TASK_MOVES: remove_lease},
    "confirmation": {"pilotflame_sdk.task_channel": remove_confirmation},
    "sweep": {STORE: remove_sweep},
    "journal": {STORE: remove_journal},
}


class DamagingFinder(MetaPathFinder):
    """Finder that replaces parts of modules right after they are executed."""

    def __init__(self, damage: dict[str, Callable[[Any], None]]) -> None:
        self._damage = damage

    def find_spec(
        self, fullname: str, _path: Sequence[str] | None = None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec with a loader that damages it; None for other modules."""
        damage = self._damage.pop(fullname, None)
        if damage is None:
            return None
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        spec.loader = DamagingLoader(spec.loader, damage)
        return spec


class DamagingLoader(Loader):
    """Loader that executes a module and then damages it."""

    def __init__(self, loader: Loader, damage: Callable[[Any], None]) -> None:
        self._loader = loader
        self._run = damage

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """Create the module as the real loader does."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module, and damage it."""
        self._loader.exec_module(module)
        self._run(module)


if without := os.environ.get("PILOTFLAME_FAULTS_WITHOUT"):
    sys.meta_path.insert(0, DamagingFinder(dict(DAMAGE[without])))
