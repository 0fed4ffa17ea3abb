"""Calls of single nodes, compiled and rendered as in a run."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import cast

from engine.graph import Node
from engine.node import Call, HttpClient, HttpResponse, Outcome, Result, Services, Wait
from engine.program import compile_node
from engine.values import Json
from nodes import catalog

NOW = datetime(2026, 1, 1, tzinfo=UTC)


class NoNetwork:
    """Stands where a client would, for nodes that have no business outside."""

    async def request(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str],
        body: bytes | None,
        timeout_seconds: float,
        follow_redirects: bool = True,
    ) -> HttpResponse:
        raise AssertionError(
            f"{method} {url} was asked for {headers, body, timeout_seconds, follow_redirects}"
        )


@dataclass
class Called:
    """What came of a call, and what it left behind."""

    outcome: Outcome = None
    unresolved: list[str] = field(default_factory=list)
    lines: list[tuple[str, str]] = field(default_factory=list)

    @property
    def output(self) -> Json:
        return self.outcome.output if isinstance(self.outcome, Result | Wait) else self.outcome

    @property
    def port(self) -> str:
        return self.outcome.port if isinstance(self.outcome, Result) else "output"


async def call(
    node_type: str, config: Mapping[str, Json], data: Json = None, *, http: HttpClient | None = None
) -> Called:
    """Run one node on `data`; raises what it raises."""
    called = Called()
    program = compile_node(Node(id="node", type=node_type, config=config), catalog.load())
    assert program.missing is None, program.missing
    scope: dict[str, Json] = {"data": data, "trigger": data, "nodes": {}, "execution": {"id": "exec"}}
    outcome = catalog.load().implementation(node_type)(
        Call(
            config=cast("Mapping[str, Json]", program.config.render(scope, called.unresolved)),
            data=data,
            scope=scope,
            conditions=program.conditions,
            values=program.values,
            unresolved=called.unresolved,
            log=lambda level, message: called.lines.append((level, message)),
            idempotency_key="exec:node:0",
            attempt=1,
            now=NOW,
            services=Services(http=http or NoNetwork()),
        )
    )
    called.outcome = await outcome if inspect.isawaitable(outcome) else outcome
    return called
