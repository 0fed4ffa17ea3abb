"""Catalog of a shared worker: nodes that may compute for long run in child processes, all others in place."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import isawaitable
from typing import TYPE_CHECKING, Final

import msgspec

from concurrency import offload
from engine.node_api import CpuDemand
from engine.values import encode_json
from nodes.catalog import NodeCatalog
from nodes.sandbox.frames import LibraryJob
from nodes.sandbox.processes import JobListener

if TYPE_CHECKING:
    from engine.node_api import NodeCall, NodeOutcome, RunNode
    from nodes.sandbox.processes import ProcessPool

IN_PLACE_BYTES: Final = 4_096
"""Maximum JSON size of a config that is processed in place: sending it would take as long."""
DEADLINE_SECONDS: Final = 60.0


@dataclass(frozen=True)
class PooledCatalog(NodeCatalog):
    """Catalog with a process pool for node types that need one."""

    processes: ProcessPool

    def implementation(self, type: str) -> RunNode:  # noqa: A002 - the field's own word
        """Return the function that runs a node type: in a child process if it always computes for long, or, for some
        types, if its config is large.

        Raises `UnknownNodeType`.
        """
        match self.get(type).cpu:
            case None:
                return super().implementation(type)
            case CpuDemand.ALWAYS:
                return self._run_in_process(type)
            case CpuDemand.LARGE:
                return self._run_where_it_fits(super().implementation(type), self._run_in_process(type))

    def _run_in_process(self, type: str) -> RunNode:  # noqa: A002 - the field's own word
        async def run(call: NodeCall) -> NodeOutcome:
            return await self.processes.run(
                await offload.run(_encode_job, type, call),
                JobListener(call.log, call.unresolved),
                organization_id=call.caller.organization_id,
                seconds=DEADLINE_SECONDS,
            )

        return run

    def _run_where_it_fits(self, here: RunNode, elsewhere: RunNode) -> RunNode:
        async def run(call: NodeCall) -> NodeOutcome:
            outcome = here(call) if _is_small_call(call) else elsewhere(call)
            return await outcome if isawaitable(outcome) else outcome

        return run


def _encode_job(type: str, call: NodeCall) -> bytes:  # noqa: A002 - the field's own word
    return msgspec.json.encode(LibraryJob(type, msgspec.Raw(encode_json(call.config))))


def _is_small_call(call: NodeCall) -> bool:
    try:
        return len(offload.try_inline(encode_json, call.config)) <= IN_PLACE_BYTES
    except offload.BudgetExceeded:
        return False
