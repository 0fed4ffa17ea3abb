"""Paths of the reads that `million` measures: pages of the dashboard and routes, with their filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from tests.many_objects import FAILED_RUN, QUESTION_OFFSET
from tests.many_runs import (
    COMMON_TAG,
    CUSTOMER_KEY,
    ORDER_KEY,
    RARE_TAG,
    cursor_behind,
    run_id,
    workflow_id,
)

RUNS: Final = 1_000_000
MIDDLE: Final = RUNS // 2
_PATH: Final = "/api/v1/executions"
_WORKFLOWS: Final = "/api/v1/workflows"
_HOUR: Final = "since=2023-11-14T22:30:00Z&until=2023-11-14T23:30:00Z"
_FAILED: Final = run_id(MIDDLE + FAILED_RUN)
_WAITING: Final = run_id(MIDDLE + QUESTION_OFFSET)
_ORDERS: Final = {"": "", "worst": "order=worst", "last_run": "order=last-run", "name": "order=name"}
_STATES: Final = ("failing", "unfinished", "awake", "asleep")
_FILTERED_WORKFLOWS: Final = {
    f"workflows_page_by_{order or 'default'}{'_' * bool(state)}{state}": "/dashboard/workflows?"
    + "&".join(filter(None, [query, f"state={state}" if state else ""]))
    for order, query in _ORDERS.items()
    for state in ("", *_STATES)
    if order or state
}
READS: Final[Mapping[str, str]] = {
    "run": f"{_PATH}/{run_id(MIDDLE)}",
    "why_of_an_ended_run": f"{_PATH}/{run_id(MIDDLE)}/why",
    "why_of_a_pending_run": f"{_PATH}/{run_id(MIDDLE + 7)}/why",
    "why_of_a_workflow": f"/api/v1/workflows/{workflow_id(3)}/why",
    "why_of_all": "/api/v1/why",
    "spans_of_a_run": f"{_PATH}/{run_id(MIDDLE)}/spans",
    "newest_page": f"{_PATH}?after=start",
    "page_after_half": f"{_PATH}?after={cursor_behind(MIDDLE)}",
    "newest_100": f"{_PATH}?after=start&limit=100",
    "oldest_page": f"{_PATH}?after=start&sort=createdAt:asc",
    "page_of_a_workflow": f"{_PATH}?after=start&workflow_id={workflow_id(3)}",
    "failed_page": f"{_PATH}?after=start&status=failed",
    "live_page": f"{_PATH}?after=start&status=pending,running,waiting",
    "page_of_a_trigger": f"{_PATH}?after=start&trigger_type=webhook",
    "page_of_an_hour": f"{_PATH}?after=start&since=2023-11-14T22:30:00Z&until=2023-11-14T23:30:00Z",
    "page_of_metadata": f"{_PATH}?after=start&metadata.{ORDER_KEY}=700000",
    "list_of_metadata": f"{_PATH}?metadata.{ORDER_KEY}=700000",
    "page_of_common_metadata": f"{_PATH}?after=start&metadata.{CUSTOMER_KEY}=c7",
    "page_of_two_keys": f"{_PATH}?after=start&metadata.{CUSTOMER_KEY}=c7&metadata.{ORDER_KEY}=7007",
    "page_of_a_common_tag": f"{_PATH}?after=start&tag={COMMON_TAG}",
    "page_of_a_rare_tag": f"{_PATH}?after=start&tag={RARE_TAG}",
    "failed_page_of_a_common_tag": f"{_PATH}?after=start&tag={COMMON_TAG}&status=failed",
    "deliveries": f"/api/v1/workflows/{workflow_id(0)}/deliveries?after=start",
    "events": "/api/v1/events?after=start",
    "audit_trail": "/api/v1/audit?after=start",
    "graph_of_a_run": f"{_PATH}/{run_id(MIDDLE)}/graph",
    "statistics_of_a_workflow": f"/api/v1/workflows/{workflow_id(3)}/statistics",
    "statistics_of_all": f"{_PATH}/statistics",
    "failures_of_a_day": f"{_PATH}/failures",
    "activity": "/api/v1/workflows/activity",
    "deployments": "/api/v1/deployments",
    "summary_of_deployments": "/api/v1/deployments/summary",
    "pod_time": "/api/v1/deployments/usage",
    "dead_letter_groups": "/api/v1/dead-letters/groups",
    "overview_page": "/dashboard/overview",
    "runs_page": "/dashboard/runs",
    "runs_page_after_half": f"/dashboard/runs?after={cursor_behind(MIDDLE)}",
    "failed_runs_page": "/dashboard/runs?status=failed",
    "runs_page_of_a_workflow": f"/dashboard/runs?workflow_id={workflow_id(3)}",
    "run_page": f"/dashboard/runs/{run_id(MIDDLE)}",
    "workflows_page": "/dashboard/workflows",
    "workflow_page": f"/dashboard/workflows/{workflow_id(3)}",
    "lifecycle_page": f"/dashboard/workflows/{workflow_id(3)}/lifecycle",
    "trigger_page": f"/dashboard/workflows/{workflow_id(3)}/trigger",
    "versions_page": f"/dashboard/workflows/{workflow_id(3)}/versions",
    "schedule_page": "/dashboard/schedule",
    "approvals_page": "/dashboard/approvals",
    "sources_page": "/dashboard/sources",
    "keys_page": "/dashboard/keys",
    "deliveries_page": "/dashboard/deliveries",
    "delivery_page": f"/dashboard/deliveries/dlv_{RUNS // 10:026}",
    "rejected_deliveries_page": "/dashboard/deliveries?outcome=rejected",
    "dead_letters_page": "/dashboard/dead-letters",
    "audit_page": "/dashboard/audit",
    "health_page": "/dashboard/health",
    # Filters that select few runs, or none, of many: the plans differ from those of frequent values.
    "page_of_a_rare_trigger": f"{_PATH}?after=start&trigger_type=email",
    "page_of_a_tag_and_a_rare_trigger": f"{_PATH}?after=start&tag={COMMON_TAG}&trigger_type=email",
    "failed_page_of_a_workflow": f"{_PATH}?after=start&status=failed&workflow_id={workflow_id(1)}",
    "failed_page_of_a_workflow_without": f"{_PATH}?after=start&status=failed&workflow_id={workflow_id(4)}",
    "page_of_a_workflow_and_a_rare_trigger": f"{_PATH}?after=start&trigger_type=email&workflow_id={workflow_id(3)}",
    "failed_page_of_an_hour": f"{_PATH}?after=start&status=failed&{_HOUR}",
    "completed_page": f"{_PATH}?after=start&status=completed",
    "page_of_children": f"{_PATH}?after=start&parent_id={_WAITING}",
    "why_of_a_waiting_run": f"{_PATH}/{_WAITING}/why",
    "failed_run": f"{_PATH}/{_FAILED}",
    "spans_of_500_failures": f"{_PATH}/{_FAILED}/spans?limit=100",
    "graph_of_500_failures": f"{_PATH}/{_FAILED}/graph",
    "same_failures": f"{_PATH}/{_FAILED}/same-failures",
    "inputs_of_a_run": f"{_PATH}/{_WAITING}/pending-inputs",
    "workflows": _WORKFLOWS,
    "workflows_by_cursor": f"{_WORKFLOWS}?after=start",
    "workflows_by_name": f"{_WORKFLOWS}?sort=name:asc",
    "workflow_statistics": f"{_WORKFLOWS}/stats",
    "versions": f"{_WORKFLOWS}/{workflow_id(3)}/versions",
    "lifecycle": f"{_WORKFLOWS}/{workflow_id(3)}/lifecycle",
    "lifecycle_history": f"{_WORKFLOWS}/{workflow_id(3)}/lifecycle/history",
    "schedules": "/api/v1/schedules",
    "timeline_of_a_week": "/api/v1/schedules/timeline?hours=168",
    "questions": "/api/v1/pending-inputs?after=start&others=true",
    "own_questions": "/api/v1/pending-inputs?after=start&assignment=caller",
    "answers": "/api/v1/answered-inputs",
    "keys": "/api/v1/auth/keys",
    "users": "/api/v1/auth/users",
    "invitations": "/api/v1/auth/invitations",
    "trigger_tokens": "/api/v1/auth/trigger-tokens",
    "sources": "/api/v1/datasources",
    "models": "/api/v1/ai/models",
    "tool_servers": "/api/v1/ai/tool-servers",
    "model_costs": "/api/v1/ai/costs",
    "tasks": "/api/v1/tasks",
    "drift": "/api/v1/admin/drift",
    "health": "/api/v1/admin/health",
    "events_of_a_type": "/api/v1/events?after=start&eventType=order.created",
    "events_of_an_absent_source": "/api/v1/events?after=start&source=absent",
    "deliveries_of_a_rare_route": "/api/v1/deliveries?route=hook",
    "deliveries_of_a_workflow_and_a_rare_route": f"{_WORKFLOWS}/{workflow_id(0)}/deliveries?after=start&route=hook",
    "rejected_deliveries": "/api/v1/deliveries?outcome=rejected",
    "audit_of_an_action": "/api/v1/audit?after=start&action=workflow.updated",
    "audit_of_an_object": f"/api/v1/audit?after=start&objectId={workflow_id(3)}",
    "audit_of_an_absent_user": "/api/v1/audit?after=start&userId=user_absent",
    "dead_letters": "/api/v1/dead-letters",
    "dead_letters_of_a_workflow": f"/api/v1/dead-letters?workflow_id={workflow_id(1)}",
    "dead_letters_of_a_rare_trigger": "/api/v1/dead-letters?trigger_type=event",
    **_FILTERED_WORKFLOWS,
    "workflows_page_of_a_search": "/dashboard/workflows?search=Million%201",
    "workflows_page_of_a_tag": "/dashboard/workflows?tag=production",
    "workflows_page_from_9000_on": "/dashboard/workflows?offset=9000",
    "page_of_a_failing_workflow": f"/dashboard/workflows/{workflow_id(1)}",
    "table_of_a_workflow": f"/dashboard/workflows/{workflow_id(3)}?view=table",
    "trigger_page_of_many_deliveries": f"/dashboard/workflows/{workflow_id(0)}/trigger",
    **{
        f"{status}_runs_page": f"/dashboard/runs?status={status}"
        for status in ("completed", "pending", "running", "waiting", "stopped", "cancelled")
    },
    "runs_page_of_a_trigger": "/dashboard/runs?trigger_type=webhook",
    "runs_page_of_a_rare_trigger": "/dashboard/runs?trigger_type=email",
    "runs_page_of_an_hour": f"/dashboard/runs?{_HOUR}",
    "failed_runs_page_of_a_workflow": f"/dashboard/runs?status=failed&workflow_id={workflow_id(1)}",
    "alike_runs_page": f"/dashboard/runs?alike={_FAILED}",
    "page_of_a_run_with_500_failures": f"/dashboard/runs/{_FAILED}",
    "page_of_a_failed_node": f"/dashboard/runs/{_FAILED}?node=clean",
    "map_of_a_run": f"/dashboard/runs/{_FAILED}?view=map",
    "table_of_a_run": f"/dashboard/runs/{_FAILED}?view=table",
    "page_of_a_waiting_run": f"/dashboard/runs/{_WAITING}",
    "deliveries_page_of_a_workflow": f"/dashboard/deliveries?workflow_id={workflow_id(0)}",
    "deliveries_page_of_a_rare_route": "/dashboard/deliveries?route=hook",
    "dead_letters_page_of_a_workflow": f"/dashboard/dead-letters?workflow_id={workflow_id(1)}",
    "schedule_page_of_a_week": "/dashboard/schedule?hours=168",
    "models_page": "/dashboard/models",
    "audit_page_of_an_action": "/dashboard/audit?action=workflow.updated",
    "audit_page_of_an_object": f"/dashboard/audit?objectId={workflow_id(3)}",
    "approvals_page_of_all": "/dashboard/approvals?tab=all",
    "approvals_page_of_groups": "/dashboard/approvals?tab=groups",
    "answers_page": "/dashboard/approvals?tab=answered",
}
"""Paths of the measured reads by name."""
