"""Commands that make workflows equal to files, compare the two, and write files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer import Argument, Option

from pilotflame import exit_codes
from pilotflame.command_error import CommandError
from pilotflame.commands.arguments import YesOption, confirm
from pilotflame.commands.output import OutputFormat, remark, say, show_table, show_value
from pilotflame.commands.server_connection import connect
from pilotflame.commands.workflow_definitions import (
    WorkflowFile,
    file_text,
    name_files,
    name_positions,
    read_definition,
    read_files,
    strip_document,
)

if TYPE_CHECKING:
    from pilotflame_sdk import Client

APPLY = "/api/v1/workflows/apply"
MANY = 10
"""Removals from which `--prune` asks."""
SHOWN_CHARACTERS = 100
SIGNS = {"create": "+", "update": "~", "archive": "-", "delete": "-", "conflict": "!", "unchanged": " "}

FilesOption = Annotated[
    list[Path] | None,
    Option("--filename", "-f", help="File, or folder with YAML and JSON files; may be repeated."),
]
SetOption = Annotated[
    str | None, Option("--set", help="Set of the workflows, so that --prune knows its members.")
]
PruneOption = Annotated[
    Literal["archive", "delete"] | None,
    Option("--prune", help="Archive or delete members of the set without a file."),
]
ForceOption = Annotated[bool, Option("--force", help="Overwrite workflows that were changed elsewhere.")]


def apply(
    file: Annotated[
        Path | None, Argument(help="YAML or JSON file of one workflow, created or updated by its name.")
    ] = None,
    files: FilesOption = None,
    set_name: SetOption = None,
    prune: PruneOption = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Only print the plan.")] = False,
    force: ForceOption = False,
    strict: Annotated[bool, Option("--strict", help="Fail on warnings of the validation.")] = False,
    yes: YesOption = False,
    output: Annotated[OutputFormat, Option("--output", "-o", help="table or json.")] = OutputFormat.TABLE,
) -> None:
    """Create or update workflows from files.

    With -f, the server plans all files together and applies all or none of them. A workflow that was changed
    elsewhere is a conflict: nothing is applied, and the differences are printed; --dry-run exits with 7.

    With a FILE alone, prints the id of its workflow; exits with 1 if validation finds errors, or warnings and --strict.
    """
    from pilotflame_sdk.workflow_files import warning_texts

    if file is not None and not (files or set_name or prune or dry_run):
        _apply_one(file, is_strict=strict)
        return
    found = read_files([*([file] if file is not None else []), *(files or [])])
    request = _build_request(found, set_name, prune, force=force, strict=strict)
    client = connect()
    if prune is not None and not dry_run:
        _confirm_removals(client, found, request, is_confirmed=yes)
    answer = _send_apply(client, found, {**request, "dryRun": dry_run})
    for text in warning_texts(answer):
        remark(text)
    if output is OutputFormat.TABLE:
        changes = [one for one in answer["changes"] if one["action"] != "unchanged"]
        rows = [[one["action"], one["name"], one["workflowId"]] for one in changes]
        if rows:
            show_table(rows, ["Action", "Workflow", "Id"])
        remark(_summarize_counts(answer))
    else:
        show_value(answer, output)
    if dry_run and answer["counts"].get("conflict"):
        raise typer.Exit(exit_codes.DIFFERENT)


def _apply_one(file: Path, *, is_strict: bool) -> None:
    """Create or update the workflow of a file by its name, print its id and the findings of its validation, and exit
    with 1 for errors, and if `is_strict` for warnings.
    """
    from pilotflame_sdk import ValidationFailed
    from pilotflame_sdk.workflow_files import finding_text

    definition = read_definition(file)
    client = connect()
    try:
        workflow_id = client.workflows.put(definition)
    except ValidationFailed as error:
        text = f"{file}: Workflow {definition['name']!r}: {error}"
        raise CommandError(text, exit_codes.REFUSED) from error
    typer.echo(workflow_id)
    validation = client.workflows.validate(workflow_id)
    for finding in (*validation["errors"], *validation["warnings"]):
        remark(finding_text(definition["name"], finding))
    if validation["errors"] or (is_strict and validation["warnings"]):
        raise typer.Exit(exit_codes.REFUSED)


def diff(
    files: Annotated[
        list[Path],
        Option("--filename", "-f", help="File, or folder with YAML and JSON files; may be repeated."),
    ],
    set_name: SetOption = None,
    prune: PruneOption = None,
    exit_code: Annotated[bool, Option("--exit-code", help="Exit with 7 if anything differs.")] = False,
    output: Annotated[OutputFormat, Option("--output", "-o", help="table or json.")] = OutputFormat.TABLE,
) -> None:
    """Show how files differ from the workflows of the server, and change nothing."""
    found = read_files(files)
    answer = _send_apply(
        connect(), found, {**_build_request(found, set_name, prune, force=False), "dryRun": True}
    )
    if output is OutputFormat.TABLE:
        for line in diff_lines(answer["changes"]):
            say(line)
        remark(_summarize_counts({**answer, "dryRun": False}))
    else:
        show_value(answer, output)
    if exit_code and any(one["action"] != "unchanged" for one in answer["changes"]):
        raise typer.Exit(exit_codes.DIFFERENT)


def export(
    workflows: Annotated[
        list[str] | None, Argument(metavar="[WORKFLOW...]", help="Ids or exact names; all without any.")
    ] = None,
    directory: Annotated[
        Path | None,
        Option("--directory", "-d", help="Folder for a file of each workflow; else to standard output."),
    ] = None,
    tag: Annotated[str | None, Option(help="Only workflows with this tag.")] = None,
) -> None:
    """Write workflows as YAML files for `apply -f`, without credentials; data sources are named."""
    client = connect()
    ids = [client.workflows.find(one) for one in workflows or ()]
    if not workflows:
        ids = [str(one["id"]) for one in client.workflows.iterate(tag=tag)]
    sources = list(client.datasources.iterate())
    counts = Counter(one["name"] for one in sources)
    # A name that several have would be refused: their ids stay.
    named = {str(one["id"]): f"@{one['name']}" for one in sources if counts[one["name"]] == 1}
    documents = [_export_document(client, workflow_id, named) for workflow_id in ids]
    if directory is None:
        for text in map(file_text, documents):
            say(text if len(documents) == 1 else f"---\n{text}")
        return
    directory.mkdir(parents=True, exist_ok=True)
    for path, document in name_files(directory, documents):
        path.write_text(file_text(document) + "\n", encoding="utf-8")
        typer.echo(str(path))


def _export_document(client: Client, workflow_id: str, sources: Mapping[str, str]) -> dict[str, Any]:
    """Return a workflow as `apply` reads it; credentials that the export left out are remarked."""
    whole: dict[str, Any] = dict(client.workflows.export(workflow_id))
    for one in whole["removedSecrets"]:
        place = f"{one['nodeId']}: " if one["nodeId"] else ""
        remark(f"{whole['name']}: the credential at {place}{one['path']} is left out")
    return strip_document(whole, sources)


# ── requests ────────────────────────────────────────────────────────────────────────────────────────────────


def _build_request(
    found: Sequence[WorkflowFile],
    set_name: str | None,
    prune: str | None,
    *,
    force: bool,
    strict: bool = False,
) -> dict[str, Any]:
    """Return the body of an `apply` request for these files; raises `CommandError` for pruning without a set."""
    if prune is not None and set_name is None:
        raise CommandError("--prune needs --set: only members of a set are removed")
    fields = {"set": set_name, "prune": prune, "force": force, "strict": strict or None}
    return {
        "workflows": [one.definition for one in found],
        **{k: v for k, v in fields.items() if v is not None},
    }


def _send_apply(client: Client, found: Sequence[WorkflowFile], request: Mapping[str, Any]) -> dict[str, Any]:
    """Send an `apply` request and return the answer.

    Raises `APIError`, with files in place of positions; the differences of conflicts are printed before, except for a
    dry run.
    """
    from pilotflame_sdk import APIError

    try:
        answer: dict[str, Any] = client.request("POST", APPLY, json=request, wait=60.0)
    except APIError as error:
        error.details = [
            {
                **one,
                **{key: name_positions(str(one[key]), found) for key in ("path", "message") if key in one},
            }
            for one in error.details
        ]
        if error.code == "apply-conflict" and not request.get("dryRun"):
            _show_conflicts(client, request)
        raise
    return answer


def _show_conflicts(client: Client, request: Mapping[str, Any]) -> None:
    """Print the differences of the conflicts of a refused request to standard error; nothing if they can't be read."""
    from pilotflame_sdk import APIError

    try:
        planned = client.request("POST", APPLY, json={**request, "dryRun": True}, wait=60.0)
    except APIError:
        return  # The refusal itself says it.
    conflicts = [one for one in planned["changes"] if one["action"] == "conflict"]
    for line in diff_lines(conflicts):
        typer.echo(line, err=True)


def _confirm_removals(
    client: Client, found: Sequence[WorkflowFile], request: Mapping[str, Any], *, is_confirmed: bool
) -> None:
    """Ask before an `apply` that deletes workflows, archives over ten, or removes a whole set, having no files; abort
    the command unless the answer is yes.

    The server plans the request first; nothing is asked about fewer archived workflows, or if `is_confirmed`.
    """
    planned = _send_apply(client, found, {**request, "dryRun": True})
    removed = [one["name"] for one in planned["changes"] if one["action"] in {"archive", "delete"}]
    if removed and (not found or len(removed) > MANY or request["prune"] == "delete"):
        shown = ", ".join(removed[:MANY]) + (", …" if len(removed) > MANY else "")
        confirm(f"{request['prune']} {len(removed)} workflows ({shown})?", is_confirmed=is_confirmed)


def _summarize_counts(answer: Mapping[str, Any]) -> str:
    """Return the numbers of workflows by action as one line."""
    counts = ", ".join(f"{count} {action}" for action, count in answer["counts"].items()) or "no workflow"
    return f"{counts} (dry run)" if answer["dryRun"] else counts


# ── differences ─────────────────────────────────────────────────────────────────────────────────────────────


def diff_lines(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return planned changes as lines of text for a terminal; unchanged workflows are left out."""
    lines = []
    for one in changes:
        if one["action"] == "unchanged":
            continue
        reason = f": {one['conflict']}" if one["conflict"] else ""
        lines.append(f"{SIGNS[one['action']]} {one['name']} ({one['action']}{reason})")
        lines += [f"    {line}" for line in _workflow_lines(one.get("diff") or {})]
    return lines


def _workflow_lines(found: Mapping[str, Any]) -> list[str]:
    """Return the lines that show what an `apply` changes in one workflow: its fields, nodes and connections."""
    lines = [_change_line(name, change) for name, change in found.get("fields", {}).items()]
    for word, kind in (("node", "nodes"), ("connection", "connections")):
        items = found.get(kind) or {}
        lines += [f"+ {word} {_item_text(one)}" for one in items.get("added", ())]
        lines += [f"- {word} {_item_text(one)}" for one in items.get("removed", ())]
        for one in items.get("changed", ()):
            lines += [f"~ {word} {one['id']} {_change_line(*pair)}" for pair in one["changes"].items()]
    return lines


def _item_text(item: Mapping[str, Any]) -> str:
    """Return a connection or a node as a text of the diff."""
    if "target" in item:
        return f"{item['source']}.{item['sourcePort']} -> {item['target']}.{item['targetPort']}"
    return f"{item['id']} ({item['type']})"


def _change_line(name: str, change: Mapping[str, Any]) -> str:
    return f"{name}: {_value_text(change, 'before')} -> {_value_text(change, 'after')}"


def _value_text(change: Mapping[str, Any], side: str) -> str:
    """Return the value before or after a change (`side` is "before" or "after") as JSON, truncated; `(none)` without
    one.
    """
    import json

    if side not in change:
        return "(none)"
    text = json.dumps(change[side], ensure_ascii=False)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
