"""One pod's life: scheduled, its container started, probed, started again when it ends, and stopped.

The container's command is a local process that listens on an address of the loopback network, so that its HTTP is real.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import re
import signal
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import aiohttp

from tests.cluster.fake_api.api_errors import Json, KubernetesError
from tests.cluster.fake_api.machines import FakeMachine
from tests.cluster.fake_api.schema import KINDS
from tests.cluster.fake_api.store import ObjectStore, format_now

OUT_OF_MEMORY = 137
"""Exit code with which a program poses as killed for lack of memory."""
_REFERENCE = re.compile(r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_.-]*)\)")


@dataclass
class NodeBehavior:
    """Behavior of machines and controllers."""

    runs_commands: bool = False
    """If false, a container is ready as soon as it is started, without a process."""
    delay_seconds: float = 0.02
    """Delay until a controller notices a change."""
    first_retry_seconds: float = 0.005
    """First delay until a ReplicaSet retries a refused pod; doubled each time."""
    restart_seconds: float = 0.3
    pull_seconds: float = 0.3
    """Delay until a failed image pull is retried; up to five minutes in a real kubelet."""
    start_seconds: float = 0.0
    """Time that a kubelet prepares a container before it starts it."""
    starts_at_once: int = 1_000
    """Containers that all kubelets together prepare at once, as limited by their processors."""
    preparing: list[str] = field(default_factory=list)
    """Pods with containers to prepare, those that wait for others last."""
    most_preparing: int = 0
    """Maximum length of this list."""
    terminate_seconds: float = 0.0
    """Delay until a kubelet notices that all containers of a terminating pod have ended."""
    probe_seconds: float = 0.03
    missing_images: set[str] = field(default_factory=set)
    """Images that no registry has; neither are those of `*.invalid`."""
    machines: list[FakeMachine] = field(default_factory=lambda: [FakeMachine()])
    path: str = "/usr/local/bin:/usr/bin:/bin"
    """PATH of commands."""
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(os.getpid() * 64))
    """Of addresses: those of two test processes should not meet."""

    def address(self) -> str:
        number = next(self.numbers) % (250 * 250 * 120)
        return f"127.{number // 62_500 + 2}.{number // 250 % 250 + 1}.{number % 250 + 1}"


class _NotStarted(Exception):
    """The container waits, for a reason."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class FakeKubelet:
    """Kubelet of one pod, from its start until it is deleted."""

    def __init__(
        self, store: ObjectStore, pod: Json, node: NodeBehavior, machine: FakeMachine, second: float
    ) -> None:
        self.lines: list[tuple[str, str]] = []
        self.earlier_lines: list[tuple[str, str]] | None = None
        self.has_started = False
        self.is_dead = False
        """Its machine has lost its power."""
        self.machine = machine
        self._store = store
        self._pod = pod
        self._node = node
        self._second = second
        self._told: Json | None = None
        self._stop = asyncio.Event()
        self._process: asyncio.subprocess.Process | None = None
        self._address = node.address()
        self._restarts = 0
        self._running: Json = {}
        self._last: Json = {}
        self._task = asyncio.create_task(self._live())

    @property
    def _container(self) -> Json:
        container: Json = self._pod["spec"]["containers"][0]
        return container

    def stop(self) -> None:
        """Begin to stop the pod: its container gets the grace period to end."""
        self._stop.set()

    async def kill(self) -> None:
        """Kill the container at once, and report nothing more."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    def report(self) -> None:
        """Report the current state again, after the control plane was cut off for a while."""
        if self._told is not None:
            self._store_status(self._told)

    async def _live(self) -> None:
        """Run the pod until it is stopped, show its final phase for a moment, and remove it."""
        await self._keep_up()
        await asyncio.sleep(self._node.terminate_seconds)
        # An ended pod is listed for a moment more, as one in a final phase.
        has_failed = not self.has_started
        ended = {"exitCode": 137 if has_failed else 0, "reason": "Completed", "finishedAt": format_now()}
        self._report_state({"terminated": ended}, phase="Failed" if has_failed else "Succeeded")
        await asyncio.sleep(self._node.delay_seconds)
        metadata = self._pod["metadata"]
        while not self.machine.is_heard:  # noqa: ASYNC110 - machines have no event
            await asyncio.sleep(self._node.delay_seconds)
        self._store.remove(("pods", metadata["namespace"], metadata["name"]))

    async def _keep_up(self) -> None:
        """Start the container again and again until the pod is stopped, with pauses after failures."""
        with tempfile.TemporaryDirectory(prefix="pod-") as folder:
            while not self._stop.is_set():
                try:
                    await self._run(folder)
                except _NotStarted as why:
                    await self._wait_for(why)

    async def _wait_for(self, why: _NotStarted) -> None:
        self._report_state({"waiting": {"reason": why.reason, "message": str(why)}})
        is_image = why.reason == "ImagePullBackOff"
        await self._pause(self._node.pull_seconds if is_image else self._node.restart_seconds)

    async def _run(self, folder: str) -> None:
        """Run the container once, to its end or to the stop of the pod; raises `_NotStarted` if it has to wait."""
        image = self._container["image"]
        if ".invalid/" in image or image in self._node.missing_images:
            first = f'failed to pull image "{image}": not found'
            self._report_state({"waiting": {"reason": "ErrImagePull", "message": first}})
            await self._pause(self._node.delay_seconds)
            words = f'Back-off pulling image "{image}": ErrImagePull: {first}'
            raise _NotStarted("ImagePullBackOff", words)
        environment = self._environment()
        await self._prepare()
        if self._stop.is_set():
            return
        self.has_started = True
        if not self._node.runs_commands:
            self._running = {"running": {"startedAt": format_now()}}
            self._report_state(self._running, is_ready=True)
            await self._stop.wait()
            return
        command = [_expand_variables(part, environment) for part in self._container.get("command") or ()]
        code = await self._process_ended(command, environment, folder)
        if self._stop.is_set():
            return
        reason = "OOMKilled" if code == OUT_OF_MEMORY else "Error" if code else "Completed"
        ended: Json = {"terminated": {"exitCode": code, "reason": reason, "finishedAt": format_now()}}
        if self._container.get("terminationMessagePolicy") == "FallbackToLogsOnError" and code:
            ended["terminated"]["message"] = "\n".join(text for _, text in self.lines[-80:])
        self._report_state(ended)
        await self._pause(self._node.delay_seconds)
        self._last, self.earlier_lines, self.lines = ended, self.lines, []
        self._restarts += 1
        if self._restarts > 1:
            raise _NotStarted(
                "CrashLoopBackOff", f"back-off {self._node.restart_seconds}s restarting failed container"
            )

    async def _prepare(self) -> None:
        """Prepare the container for its start, as many at once as the node allows."""
        if self._node.start_seconds:
            self._report_state({"waiting": {"reason": "ContainerCreating"}})
        node, name = self._node, self._pod["metadata"]["name"]
        node.preparing.append(name)
        node.most_preparing = max(node.most_preparing, len(node.preparing))
        try:
            while name not in node.preparing[: node.starts_at_once] and not self._stop.is_set():
                await self._pause(node.delay_seconds)
            await self._pause(node.start_seconds)
        finally:
            node.preparing.remove(name)

    async def _process_ended(self, command: list[str], environment: dict[str, str], folder: str) -> int:
        """Run the command until it ends or is stopped, and return its exit code."""
        self._running = {"running": {"startedAt": format_now()}}
        process = await asyncio.create_subprocess_exec(
            *command,
            env=environment,
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        self._process = process
        self._report_state(self._running)
        helpers = [
            asyncio.create_task(step)
            for step in (self._read_log(process), self._probe(), self._drain(process))
        ]
        try:
            code = await process.wait()
            await helpers[0]
            return code
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        async for line in process.stdout:
            at = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f000Z")
            self.lines.append((at, line.decode(errors="replace").rstrip("\n")))

    async def _drain(self, process: asyncio.subprocess.Process) -> None:
        """Wait for the stop of the pod, send SIGTERM to the container, and kill it after the grace period."""
        await self._stop.wait()
        with suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
            await asyncio.sleep(self._pod["spec"]["terminationGracePeriodSeconds"] * self._second)
            process.kill()

    async def _probe(self) -> None:
        """Run the startup probe, then the readiness probe periodically."""
        async with aiohttp.ClientSession() as session:
            await self._wait_for_startup(session)
            probe = (self._container.get("readinessProbe") or {}).get("httpGet")
            if probe is None:
                self._report_state(self._running, is_ready=True)
                return
            # A terminating pod is no longer probed, and stays ready.
            while not self._stop.is_set():
                is_ready = await self._answers_probe(session, probe)
                if not self._stop.is_set():
                    self._report_state(self._running, is_ready=is_ready)
                await asyncio.sleep(self._node.probe_seconds)

    async def _wait_for_startup(self, session: aiohttp.ClientSession) -> None:
        """Wait until the startup probe has succeeded; a container that takes too long is killed."""
        probe = self._container.get("startupProbe")
        if probe is None:
            return
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + probe["periodSeconds"] * probe["failureThreshold"] * self._second
        while not self._stop.is_set() and not await self._answers_probe(session, probe["httpGet"]):
            if loop.time() > ends_at and self._process is not None:
                self._process.kill()
                return
            await asyncio.sleep(self._node.probe_seconds)

    async def _answers_probe(self, session: aiohttp.ClientSession, probe: Json) -> bool:
        """Return whether the container answers a probe with success."""
        ports = {port.get("name"): port["containerPort"] for port in self._container.get("ports") or ()}
        url = f"http://{self._address}:{ports.get(probe['port'], probe['port'])}{probe['path']}"
        with suppress(aiohttp.ClientError, OSError):
            async with session.get(url) as response:
                return response.ok
        return False

    def _environment(self) -> dict[str, str]:
        """Return the container's variables, each of which may name those before it."""
        given: dict[str, str] = {
            "PATH": self._node.path,
            "HOSTNAME": self._pod["metadata"]["name"],
        }
        for variable in self._container.get("env") or ():
            source = variable.get("valueFrom")
            if source is None:
                given[variable["name"]] = _expand_variables(variable.get("value", ""), given)
            else:
                given[variable["name"]] = self._read_reference(source)
        return given

    def _read_reference(self, source: Json) -> str:
        """Return the value of a variable that refers to a field of the pod or a Secret;
        raises `_NotStarted` if it is missing.
        """
        if "fieldRef" in source:
            metadata = self._pod["metadata"]
            fields = {
                "status.podIP": self._address,
                "metadata.name": metadata["name"],
                "metadata.namespace": metadata["namespace"],
            }
            return str(fields[source["fieldRef"]["fieldPath"]])
        reference = source["secretKeyRef"]
        try:
            secret = self._store.get(KINDS["secrets"], self._pod["metadata"]["namespace"], reference["name"])
        except KubernetesError as refused:
            raise _NotStarted("CreateContainerConfigError", str(refused)) from refused
        encoded = (secret.get("data") or {}).get(reference["key"])
        if encoded is None:
            raise _NotStarted("CreateContainerConfigError", f"couldn't find key {reference['key']} in Secret")
        return base64.b64decode(encoded).decode()

    async def _pause(self, seconds: float) -> None:
        """Wait so many seconds, or until the pod is stopped."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stop.wait()

    def _report_state(self, state: Json, *, is_ready: bool = False, phase: str | None = None) -> None:
        """Report the state of the container and the pod, as a kubelet writes it."""
        container = {
            "name": self._container["name"],
            "image": self._container["image"],
            "ready": is_ready,
            "restartCount": self._restarts,
            "state": state,
            "lastState": self._last,
        }
        self._store_status(
            {
                "phase": phase or ("Running" if self.has_started else "Pending"),
                "podIP": self._address,
                "conditions": [
                    {"type": "PodScheduled", "status": "True"},
                    {"type": "ContainersReady", "status": "True" if is_ready else "False"},
                    {"type": "Ready", "status": "True" if is_ready else "False"},
                ],
                "containerStatuses": [container],
            }
        )

    def _store_status(self, status: dict[str, Any]) -> None:
        """Keep a status as the last report, and store it unless the machine is cut off."""
        self._told = status
        if self.machine.is_heard:
            self._store.set_status(self._pod, status)


def _expand_variables(text: str, variables: dict[str, str]) -> str:
    """Substitute variables for `$(NAME)`, and `$` for `$$`; unknown names stay unchanged."""

    def value(match: re.Match[str]) -> str:
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return _REFERENCE.sub(value, text)
