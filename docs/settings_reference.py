"""Generator of the reference of settings: one row per `PILOTFLAME_` variable, grouped by subject."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from bridge.settings import RabbitmqBridgeSettings, RedisBridgeSettings, SqsBridgeSettings
from bridge.smtp_settings import SmtpListenerSettings
from gateway.settings import GatewaySettings
from runner.settings import RunnerSettings
from scheduler.settings import SchedulerSettings
from workers.deployer.settings import DeployerSettings
from workers.settings import WorkerSettings

PROCESSES: Final[Mapping[str, type[BaseSettings]]] = {
    "gateway": GatewaySettings,
    "worker": WorkerSettings,
    "scheduler": SchedulerSettings,
    "deployer": DeployerSettings,
    "runner": RunnerSettings,
}
BRIDGES: Final[tuple[type[BaseSettings], ...]] = (
    RedisBridgeSettings,
    SqsBridgeSettings,
    RabbitmqBridgeSettings,
)
"""Settings of the bridge, one type for each kind of source."""
READERS: Final[tuple[tuple[str, type[BaseSettings]], ...]] = (
    *PROCESSES.items(),
    *(("bridge", settings) for settings in BRIDGES),
    ("smtp", SmtpListenerSettings),
)
ALL: Final = tuple(dict.fromkeys(process for process, _ in READERS))
MOST_IMPORTANT: Final = ("database_url", "redis_url", "secret_key", "blob_url", "public_url")
"""Settings in the short table of the README."""

SUBJECTS: Final[Mapping[str, str]] = {
    "Storage": r"data_dir|database_url|redis_url|listen_url|blob_.*|run_path_connections",
    "Secrets and access": r"secret_key|previous_secret_keys|bootstrap_api_key|dashboard|openid_\w+",
    "Addresses": (
        r"host|port|listen_fd|public_url|cors_origins|trusted_proxies|outbound_allowed_networks|model_hosts|url"
        r"|tool_server_hosts|api_key"
    ),
    "Limits of requests": r"max_(body|mail|hook|bodies)_bytes|max_connections|(head|body|stall)_seconds",
    "Rates and backlogs": r"rate_.*|max_backlog_.*",
    "Limits of runs": r"max_(run_depth|sub_runs|row_output_bytes|output_bytes|log_lines|loop_items|iterations)",
    "Execution and recovery": (
        r"concurrency|direct_runs|lease_seconds|commit_seconds|sweep_seconds|cpu_processes|code_.*|worker_name"
    ),
    "Schedules and retention": r"(lifecycle|schedule|leadership)_seconds|retention_.*",
    "Logs, metrics, traces and shutdown": (
        r"log_level|heartbeat_file|shutdown_seconds|metrics_(address|workflows)|otlp_url|trace_.*"
        r"|((worker|scheduler|deployer|runner)_)?metrics_port"
    ),
    "Deployments": (
        r"cluster|allow_local_pods|local_pod_.*|kubeconfig|kubernetes_.*|runner_(image|gateway_url|drain_seconds)"
        r"|start_seconds|starts_at_once|settle_seconds|deployer_.*"
    ),
    "Pods (set by the deployer)": r"runner_.*",
    "Bridge": r"bridge_.*",
    "SMTP listener": r"smtp_.*",
}
"""Pattern of the field names of each subject; the first match counts."""

HEADING: Final = """\
# Settings

Every setting is an environment variable that begins with `PILOTFLAME_`. A process reads its settings once, when it
starts. *Read by* names the processes of the [Procfile](../Procfile) that use a setting, the pods of workflows
(`runner`), the [bridge](bridge.md) and the [SMTP listener](senders/mail-server.md). `pilotflame dev` reads the settings
of gateway, worker, scheduler and deployer. Durations are seconds, and sizes are bytes.

Unknown variables with this prefix are logged by name at each start, with the setting that is probably meant. The
[commands](operations.md#starting-stopping-and-deploying) exit with code 2 and one line that says what to change where a
setting is missing or invalid. `make docs` generates this page from the code.
"""
_NAME_IN_CODE = re.compile(r"`([A-Z][A-Z0-9_]+)`")


@dataclass(frozen=True, slots=True)
class SettingVariable:
    """Setting with the processes that read it."""

    name: str
    field: FieldInfo
    readers: tuple[str, ...]


def list_variables() -> dict[str, SettingVariable]:
    """Return every setting by the name of its field, in the order of the processes."""
    found: dict[str, SettingVariable] = {}
    for process, settings in READERS:
        for name, field in settings.model_fields.items():
            known = found.get(name, SettingVariable(name, field, ()))
            readers = tuple(dict.fromkeys((*known.readers, process)))
            found[name] = SettingVariable(name, known.field, readers)
    return found


def subject_of(name: str) -> str | None:
    """Return the subject of a setting by the name of its field; None if no pattern of `SUBJECTS` matches it."""
    return next((subject for subject, pattern in SUBJECTS.items() if re.fullmatch(pattern, name)), None)


def build_page() -> str:
    """Return the text of docs/settings.md."""
    found = list_variables()
    parts = [HEADING]
    for subject in SUBJECTS:
        of_subject = [each for each in found.values() if subject_of(each.name) == subject]
        parts += [f"## {subject}\n", *_format_table(of_subject, found), ""]
    return "\n".join(parts)


def build_short_table() -> str:
    """Return the short table of settings for the README."""
    found = list_variables()
    return "\n".join(_format_table([found[name] for name in MOST_IMPORTANT], found))


def _format_table(shown: Iterable[SettingVariable], known: Mapping[str, SettingVariable]) -> list[str]:
    rows = [
        f"| `{_variable_name(each.name)}` | {_format_default(each)} "
        f"| {_describe_variable(each, known)} | {_describe_readers(each)} |"
        for each in shown
    ]
    return ["| variable | default | meaning | read by |", "| --- | --- | --- | --- |", *rows]


def _describe_variable(variable: SettingVariable, known: Mapping[str, SettingVariable]) -> str:
    """Return the description of a setting for a table, with names of other settings in full."""

    def whole(match: re.Match[str]) -> str:
        return f"`{_variable_name(match[1])}`" if match[1].lower() in known else match[0]

    return _NAME_IN_CODE.sub(whole, variable.field.description or "").replace("|", r"\|")


def _format_default(variable: SettingVariable) -> str:
    if variable.field.default in {None, PydanticUndefined, (), ""}:
        return ""
    return f"`{variable.field.default}`"


def _describe_readers(variable: SettingVariable) -> str:
    absent = [process for process in ALL if process not in variable.readers]
    if not absent:
        return "all"
    return f"all but {', '.join(absent)}" if len(absent) == 1 else ", ".join(variable.readers)


def _variable_name(name: str) -> str:
    return f"PILOTFLAME_{name.upper()}"
