"""Deployments on Kubernetes: the one module that speaks to its API server.

Objects go by server-side apply in the deployer's name; the number of pods is a patch of the Deployment's own
`spec.replicas` in the scaler's. A patch of `/scale` to 0 would leave that field to nobody, since zero is absent there,
and the next apply would start what was stopped.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, Self

import aiohttp
import structlog
from kubernetes.aio import client as kubernetes_client
from kubernetes.aio import config as kubernetes_config

from models import workflow_names as names
from workers.cluster import manifests, pods
from workers.cluster.changes import Changes
from workers.cluster.driver import (
    ClusterRefused,
    ClusterUnavailable,
    LogLine,
    NotDeployed,
    Observed,
    Wanted,
)
from workers.cluster.manifests import Layout, Manifest

DEPLOYER = "pilotflame-deployer"
SCALER = "pilotflame-scaler"
REQUEST_SECONDS = 10.0
CONCURRENT_REQUESTS = 16
PAGE_SIZE = 500
PATCH_ATTEMPTS = 3
WATCH_SECONDS = 120
"""The API server ends a watch after so long, and everything is listed again: what an event missed heals then."""
WATCH_GRACE_SECONDS = 15.0
"""A stream without its end by then is one whose other side is gone."""
FIRST_PAUSE_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0
MAX_DOUBLINGS = 16
STEADY_SECONDS = 30.0
"""A stream that lasted so long is taken up again at once; shorter ones later and later."""
DELETE_SECONDS = 5.0
DELETE_POLL_SECONDS = 0.1
MAX_LOG_BYTES = 1_000_000

_CORE = "/api/v1"
_APPS = "/apis/apps/v1"
_NETWORKING = "/apis/networking.k8s.io/v1"
_COLLECTIONS = {
    "Deployment": (_APPS, "deployments"),
    "Service": (_CORE, "services"),
    "NetworkPolicy": (_NETWORKING, "networkpolicies"),
    "Secret": (_CORE, "secrets"),
    "ServiceAccount": (_CORE, "serviceaccounts"),
}
"""What a deployment is made of, in the order of removal: first what makes pods."""
_APPLY = "application/apply-patch+yaml"
_MERGE = "application/merge-patch+json"
_JSON = "application/json"
_OURS = f"{manifests.MANAGED_BY_LABEL}={manifests.MANAGED_BY}"

log = structlog.get_logger()


class _Absent(Exception):
    """404."""


class _Conflict(Exception):
    """409: somebody was faster."""


class _Expired(Exception):
    """410: the API server has forgotten what is asked for; list again."""


async def connect(layout: Layout, *, kubeconfig: Path | None = None) -> KubernetesDriver:
    """Return a driver with the rights of a kubeconfig, or of the pod's own service account.

    Raises `ClusterRefused` for a configuration that says nothing of a cluster.
    """
    configuration = kubernetes_client.Configuration()
    try:
        if kubeconfig is None:
            kubernetes_config.load_incluster_config(client_configuration=configuration)
        else:
            await kubernetes_config.load_kube_config(
                config_file=str(kubeconfig), client_configuration=configuration, persist_config=False
            )
    except (kubernetes_config.ConfigException, OSError) as error:
        raise ClusterRefused(f"There is no way to a Kubernetes API server: {error}") from error
    return KubernetesDriver(kubernetes_client.ApiClient(configuration), layout)


class KubernetesDriver:
    """The deployments of one namespace."""

    def __init__(
        self,
        api: kubernetes_client.ApiClient,
        layout: Layout,
        *,
        request_seconds: float = REQUEST_SECONDS,
        first_pause_seconds: float = FIRST_PAUSE_SECONDS,
    ) -> None:
        self._api = api
        self._layout = layout
        self._request_seconds = request_seconds
        self._first_pause_seconds = first_pause_seconds
        self._places = asyncio.Semaphore(CONCURRENT_REQUESTS)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._api.close()

    # ── what is wanted ────────────────────────────────────────────────────────────────────────────────────

    async def apply(self, wanted: Wanted) -> None:
        """Make all objects as they are wanted, and ask for the replicas.

        Fields that somebody else has set are taken back: the deployer decides about all that it applies, and the number
        of pods is not among it.
        """
        for manifest in manifests.objects(wanted, self._layout):
            path = self._path(manifest["kind"], manifest["metadata"]["name"])
            query = {"fieldManager": DEPLOYER, "force": "true"}
            await self._patch(path, manifest, content_type=_APPLY, query=query)
        await self.scale(wanted.workflow_id, wanted.replicas)

    async def scale(self, workflow_id: str, replicas: int) -> None:
        """Ask for so many pods; raises `NotDeployed`."""
        path = self._path("Deployment", names.name(workflow_id))
        change = {"spec": {"replicas": replicas}}
        try:
            await self._patch(path, change, content_type=_MERGE, query={"fieldManager": SCALER})
        except _Absent as error:
            raise NotDeployed(f"{workflow_id} is not deployed in {self._layout.namespace}") from error

    async def delete(self, workflow_id: str) -> bool:
        """Remove whatever bears the workflow's label, and look whether it is gone."""
        loop = asyncio.get_running_loop()
        ends_at = loop.time() + DELETE_SECONDS
        label = _selector(manifests.selector(workflow_id))
        while True:
            objects = [
                (kind, one["metadata"])
                for kind in _COLLECTIONS
                for one in (await self._list(self._path(kind), label))[0]
            ]
            if not objects and not (await self._list(self._path_of_pods(), label))[0]:
                return True
            for kind, metadata in objects:
                if "deletionTimestamp" not in metadata:
                    await self._remove(kind, metadata)
            if loop.time() > ends_at:
                return False
            await asyncio.sleep(DELETE_POLL_SECONDS)

    async def _remove(self, kind: str, metadata: Mapping[str, Any]) -> None:
        # What was made anew under the same name meanwhile is not what was found: its uid differs.
        options = {"propagationPolicy": "Background", "preconditions": {"uid": metadata["uid"]}}
        with suppress(_Absent, _Conflict):
            await self._request("DELETE", self._path(kind, metadata["name"]), body=options)

    # ── what there is ─────────────────────────────────────────────────────────────────────────────────────

    async def observe(self, workflow_id: str) -> Observed:
        """Read the Deployment and its pods: it alone never says why none comes up."""
        label = _selector(manifests.selector(workflow_id))
        deployment, (listed, _) = await asyncio.gather(
            self._find(self._path("Deployment", names.name(workflow_id))),
            self._list(self._path_of_pods(), label),
        )
        return pods.observed(workflow_id, deployment, listed, port=self._layout.port)

    async def list(self) -> tuple[Observed, ...]:
        """Read all Deployments and pods of ours."""
        deployments, _ = await self._list(self._path("Deployment"), _OURS)
        all_pods, _ = await self._list(self._path_of_pods(), _OURS)
        by_name: dict[str, list[Manifest]] = {}
        for pod in all_pods:
            by_name.setdefault(pod["metadata"]["labels"].get(manifests.WORKFLOW_LABEL, ""), []).append(pod)
        return tuple(
            pods.observed(workflow_id, one, by_name.get(one["metadata"]["name"], []), port=self._layout.port)
            for one in deployments
            if (workflow_id := _workflow_of(one)) is not None
        )

    async def endpoint(self, workflow_id: str) -> tuple[str, ...]:
        """Return the addresses of the ready pods."""
        observed = await self.observe(workflow_id)
        return tuple(pod.address for pod in observed.ready_pods if pod.address is not None)

    async def logs(self, workflow_id: str, *, limit: int) -> tuple[LogLine, ...]:
        """Return the last lines of all pods by their times, of a crashed container its last run's."""
        label = _selector(manifests.selector(workflow_id))
        listed, _ = await self._list(self._path_of_pods(), label)
        read = await asyncio.gather(*(self._log_of(pod, limit) for pod in listed))
        lines = sorted((line for lines in read for line in lines), key=lambda line: line.at or "")
        return tuple(lines[-limit:])

    async def _log_of(self, pod: Manifest, limit: int) -> Sequence[LogLine]:
        name: str = pod["metadata"]["name"]
        query = {
            "container": manifests.CONTAINER,
            "tailLines": str(limit),
            "limitBytes": str(MAX_LOG_BYTES),
            "timestamps": "true",
        }
        if pods.is_between_crashes(pod):
            query["previous"] = "true"
        try:
            text = await self._read("GET", f"{self._path_of_pods(name)}/log", query=query)
        except (_Absent, ClusterRefused):
            return ()  # it is gone, or has written nothing yet: its container waits to be started
        return [
            LogLine(name, at, line)
            for at, _, line in (row.partition(" ") for row in text.decode(errors="replace").splitlines())
        ]

    # ── what changes ──────────────────────────────────────────────────────────────────────────────────────

    async def watch(self) -> AsyncGenerator[str, None]:
        """Yield what to observe, for as long as it is asked for."""
        changed = Changes()
        paths = (self._path("Deployment"), self._path_of_pods())
        tasks: set[asyncio.Task[Any]] = {asyncio.create_task(self._follow(path, changed)) for path in paths}
        try:
            while True:
                upcoming = asyncio.create_task(changed.next())
                tasks.add(upcoming)
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                tasks.discard(upcoming)
                for task in done:
                    task.result()  # one that follows has no end but an error that nobody has foreseen
                yield upcoming.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _follow(self, path: str, changed: Changes) -> None:
        """List, then take events, over and over: whatever ends a stream, what it has missed is in the next list."""
        loop = asyncio.get_running_loop()
        known: set[str] = set()
        pauses = 0
        while True:
            began_at = loop.time()
            try:
                listed, version = await self._list(path, _OURS)
                now = {workflow_id for one in listed if (workflow_id := _workflow_of(one)) is not None}
                changed.add(known | now)
                known = now
                await self._take_events(path, version, known, changed)
            except _Expired:
                log.info("cluster watch expired", path=path)
            except (ClusterUnavailable, ClusterRefused, _Absent, _Conflict) as error:
                log.warning("cluster not watched", path=path, error=str(error))
            if loop.time() - began_at > STEADY_SECONDS:
                pauses = 0
                continue
            pause_seconds = min(self._first_pause_seconds * 2**pauses, MAX_PAUSE_SECONDS)
            pauses = min(pauses + 1, MAX_DOUBLINGS)
            # Not all that were cut off at once come back at once.
            await asyncio.sleep(pause_seconds * random.uniform(0.5, 1.0))  # noqa: S311

    async def _take_events(self, path: str, version: str, known: set[str], changed: Changes) -> None:
        """Tell the workflow of each event until the stream ends; raises `_Expired` for a version too old."""
        query = {
            "watch": "true",
            "labelSelector": _OURS,
            "resourceVersion": version,
            "allowWatchBookmarks": "true",
            "timeoutSeconds": str(WATCH_SECONDS),
        }
        try:
            async with asyncio.timeout(WATCH_SECONDS + WATCH_GRACE_SECONDS):
                response = await self._send("GET", path, query=query)
                async with response:
                    if response.status != HTTPStatus.OK:
                        raise _refusal(response.status, await response.content.read())
                    async for line in response.content:
                        workflow_id = _workflow_of_event(json.loads(line))
                        if workflow_id is not None:
                            known.add(workflow_id)
                            changed.add({workflow_id})
        except (aiohttp.ClientError, OSError, ValueError, kubernetes_config.ConfigException) as error:
            raise ClusterUnavailable(f"The watch was cut off: {_text(error)}") from error

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────

    def _path(self, kind: str, name: str | None = None) -> str:
        group, plural = _COLLECTIONS[kind]
        path = f"{group}/namespaces/{self._layout.namespace}/{plural}"
        return path if name is None else f"{path}/{name}"

    def _path_of_pods(self, name: str | None = None) -> str:
        path = f"{_CORE}/namespaces/{self._layout.namespace}/pods"
        return path if name is None else f"{path}/{name}"

    async def _find(self, path: str) -> Manifest | None:
        try:
            return await self._request("GET", path)
        except _Absent:
            return None

    async def _list(self, path: str, label: str) -> tuple[Sequence[Manifest], str]:
        """Return all items, page by page, and the version that they are of."""
        for _ in range(PATCH_ATTEMPTS):
            items: list[Manifest] = []
            query = {"labelSelector": label, "limit": str(PAGE_SIZE)}
            try:
                while True:
                    page = await self._request("GET", path, query=query)
                    items.extend(page["items"])
                    metadata = page["metadata"]
                    if not metadata.get("continue"):
                        return items, metadata["resourceVersion"]
                    query["continue"] = metadata["continue"]
            except _Expired:
                continue  # the pages before are of a state that the API server has forgotten
        raise ClusterUnavailable(f"{path} changed faster than it could be listed")

    async def _patch(
        self, path: str, body: Manifest, *, content_type: str, query: Mapping[str, str]
    ) -> Manifest:
        for _ in range(PATCH_ATTEMPTS):
            with suppress(_Conflict):
                return await self._request("PATCH", path, query=query, body=body, content_type=content_type)
        raise ClusterUnavailable(f"{path} was changed by others again and again")

    async def _request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = _JSON,
    ) -> Manifest:
        answer = await self._read(method, path, query=query, body=body, content_type=content_type)
        try:
            decoded: Manifest = json.loads(answer)
        except ValueError as error:
            raise ClusterUnavailable(
                f"{method} {path} was answered with something that is not JSON"
            ) from error
        return decoded

    async def _read(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = _JSON,
    ) -> bytes:
        try:
            async with asyncio.timeout(self._request_seconds), self._places:
                response = await self._send(method, path, query=query, body=body, content_type=content_type)
                answer: bytes = await response.content.read()
        except (
            aiohttp.ClientError,
            OSError,
            kubernetes_config.ConfigException,
        ) as error:  # TimeoutError is an OSError
            raise ClusterUnavailable(
                f"The API server did not answer {method} {path}: {_text(error)}"
            ) from error
        if response.status >= HTTPStatus.BAD_REQUEST:
            raise _refusal(response.status, answer)
        return answer

    async def _send(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Manifest | None = None,
        content_type: str = _JSON,
    ) -> aiohttp.ClientResponse:
        """Send a request with the client's own credentials and TLS, and return the answer as it begins.

        The client's typed methods would read manifests and answers by models of one Kubernetes version, and refuse what
        another one sends.
        """
        request = await self._api.param_serialize(
            method=method,
            resource_path=path,
            query_params=list((query or {}).items()),
            header_params={"Accept": "application/json, */*", "Content-Type": content_type},
            body=body,
            auth_settings=["BearerToken"],
        )
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._request_seconds)
        answer = await self._api.call_api(*request, _request_timeout=timeout)
        response: aiohttp.ClientResponse = answer.response
        return response


def _refusal(status: int, answer: bytes) -> Exception:
    """Return what an answer other than success means to the caller."""
    try:
        message = str(json.loads(answer)["message"])
    except (ValueError, KeyError, TypeError):
        message = answer[:200].decode(errors="replace") or "no reason given"
    match status:
        case HTTPStatus.NOT_FOUND:
            return _Absent(message)
        case HTTPStatus.CONFLICT:
            return _Conflict(message)
        case HTTPStatus.GONE:
            return _Expired(message)
        case HTTPStatus.TOO_MANY_REQUESTS | HTTPStatus.REQUEST_TIMEOUT:
            return ClusterUnavailable(message)
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR or status < HTTPStatus.BAD_REQUEST:
        return ClusterUnavailable(f"The API server failed ({status}): {message}")
    return ClusterRefused(f"The API server refused it ({status}): {message}")


def _selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())


def _workflow_of(item: Manifest) -> str | None:
    """Return the id that an object was made for; None for one that is only labelled like ours."""
    annotations = item.get("metadata", {}).get("annotations") or {}
    workflow_id: str | None = annotations.get(manifests.WORKFLOW_ANNOTATION)
    return workflow_id


def _workflow_of_event(event: Manifest) -> str | None:
    """Return whom an event is about; None for a bookmark. Raises what an error within the stream means."""
    if event["type"] == "ERROR":
        raise _refusal(event["object"].get("code", 0), json.dumps(event["object"]).encode())
    return None if event["type"] == "BOOKMARK" else _workflow_of(event["object"])


def _text(error: BaseException) -> str:
    return str(error) or type(error).__name__
