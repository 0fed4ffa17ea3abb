"""Text of explanations for a terminal: why a run, a workflow or the runs of an organization do not move."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pilotflame_sdk import Client

EXECUTION_PREFIX = "exec_"


def fetch_explanation(client: Client, subject: str | None) -> dict[str, Any]:
    """Return the explanation of an execution or workflow as the API has it, or for None of the whole organization.

    Ids of executions begin with `exec_`; a workflow is named by its id or its exact name. Raises errors of the SDK.
    """
    if subject is None:
        return dict(client.server.why())
    if subject.startswith(EXECUTION_PREFIX):
        return dict(client.executions.why(subject))
    return dict(client.workflows.why(client.workflows.find(subject)))


def render_explanation(explained: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines of text for an explanation of a run, workflow or organization."""
    if "reasons" in explained:
        yield from _organization_lines(explained)
        return
    yield _build_heading(explained)
    for blocker in explained["blockers"]:
        yield from _blocker_lines(blocker)
    if explained["next"] is not None:
        yield f"next: {explained['next']['event']} at {explained['next']['at']}"
    for fact in explained.get("unknown", ()):
        yield f"unknown: {fact}"
    if "timing" in explained:
        yield f"time: {_timing_text(explained['timing'])}"
    usage = explained.get("usage")
    if usage:
        cost = "at an unknown cost" if usage["cost"] is None else f"for ${usage['cost']}"
        tokens = usage["inputTokens"] + usage["outputTokens"]
        yield f"language models: {usage['calls']} answers with {tokens:,} tokens {cost}"
    if explained.get("criticalPath"):
        steps = (f"{step['nodeLabel']} {step['seconds']:.3f} s" for step in explained["criticalPath"])
        yield f"critical path: {' -> '.join(steps)}"
    for action in explained.get("actions", ()):
        yield f"  {action['method']} {action['path']}"


def _build_heading(explained: Mapping[str, Any]) -> str:
    """Return the first line: id, state and main reason of an execution or workflow."""
    if "deploymentStatus" in explained:
        return (
            f"{explained['workflowId']} {explained['deploymentStatus']}:"
            f" {explained['message']} ({explained['reason']})"
        )
    since = f" since {explained['since']}" if explained["since"] else ""
    return f"{explained['executionId']} {explained['status']}: {explained['primary']}{since}"


def _blocker_lines(blocker: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about one blocker (a reason why something does not move): facts, holders, and requests
    that help.
    """
    facts = [blocker["kind"]]
    if blocker["position"] is not None:
        facts.append(f"position {blocker['position']}")
    if blocker["until"] is not None:
        facts.append(f"until {blocker['until']}")
    if blocker["estimate"] is not None:
        facts.append(f"about {blocker['estimate']['at']} ({blocker['estimate']['basis']})")
    facts += [f"{name} {value}" for name, value in blocker["details"].items() if value not in (None, "")]
    yield f"- {blocker['code']}: {blocker['message']} ({', '.join(facts)})"
    for holder in blocker["by"]:
        since = f" since {holder['since']}" if holder["since"] else ""
        yield f"  held by {holder['type']} {holder['id'] or '(not visible)'}{since}"
    for action in blocker["actions"]:
        yield f"  {action['method']} {action['path']} ({action['scope']})"


def _timing_text(timing: Mapping[str, Any]) -> str:
    """Return the durations of a run by phase and kind of wait, without those that are 0; "none" without any."""
    parts = {name: timing[name] for name in ("queued", "waking", "running")} | timing["waitingFor"]
    return ", ".join(f"{name} {seconds:.3f} s" for name, seconds in parts.items() if seconds) or "none"


def _organization_lines(explained: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about an organization: unfinished runs by reason, workers, and unknown facts."""
    for reason in explained["reasons"]:
        number = f"{reason['count']}{'+' if reason['countIsLowerBound'] else ''}"
        since = f", oldest since {reason['oldestSince']}" if reason["oldestSince"] else ""
        yield f"{number:>7}  {reason['code']} ({reason['kind']}{since})"
    if not explained["reasons"]:
        yield "No unfinished runs"
    workers = explained["workers"]
    if workers["present"] is None:
        yield f"Workers: {workers['state']}"
    else:
        yield f"Workers: {workers['present']}, with {workers['heldRuns']} of at most {workers['concurrency']} runs"
    for fact in explained["unknown"]:
        yield f"unknown: {fact}"
