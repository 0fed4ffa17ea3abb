"""The HTTP of the API server: paths, queries, content types, lists and watches."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from tests.cluster.fake_api import patches, schema
from tests.cluster.fake_api.api_errors import (
    Json,
    KubernetesError,
    bad_request_error,
    conflict_error,
    invalid_error,
)
from tests.cluster.fake_api.controllers import FakeControllers, NodeBehavior
from tests.cluster.fake_api.ownership import FieldManager
from tests.cluster.fake_api.schema import KINDS, SCALE, ObjectKind
from tests.cluster.fake_api.store import ObjectStore, WatchEvent

_PATH = re.compile(
    r"(?P<group>/api/v1|/apis/[^/]+/v1)(/namespaces/(?P<namespace>[^/]+))?"
    r"/(?P<plural>[a-z]+)(/(?P<name>[^/]+))?(/(?P<subresource>scale|status|log))?\Z"
)
_NAMESPACE_PATH = re.compile(r"/api/v1/(?P<plural>namespaces)(/(?P<name>[^/]+))?\Z")
_REQUIREMENT = re.compile(r"(?P<key>[^\s=!,]+)\s*(?P<operator>==|!=|=)\s*(?P<value>[^\s=,]*)\Z")
_JSON = "application/json"
_PATCHES: Mapping[str, Callable[[Json, Any], Json]] = {
    "application/merge-patch+json": patches.merge,
    "application/strategic-merge-patch+json": patches.apply_strategic_patch,
    "application/json-patch+json": patches.apply_json_patch,
}
_APPLY = "application/apply-patch+yaml"


@dataclass(frozen=True)
class ApiTarget:
    """Target of a request path."""

    kind: ObjectKind
    namespace: str
    name: str
    subresource: str


@dataclass
class FakeApiServer:
    """API server in memory; tests read and change its fields."""

    token: str = "fake-token"
    second: float = 1.0
    """Length of the server's second: timeouts of watches and grace periods are whole seconds."""
    node: NodeBehavior = field(default_factory=NodeBehavior)
    failures: list[KubernetesError] = field(default_factory=list)
    """Answers to the next requests."""
    outage: KubernetesError | None = None
    """Answer to every request while it is set."""
    refuses: Callable[[str, str], KubernetesError | None] = lambda *_: None
    """Answer to each request with this method and path with query, until it is changed; None: as usual."""
    is_silent: bool = False
    """Accept requests without answering."""
    page_size: int | None = None
    """Most items of one page, whatever limit a client requests."""
    requests: list[str] = field(default_factory=list)
    """Method and path with query of each."""
    port: int = 0
    store: ObjectStore = field(default_factory=ObjectStore)
    controllers: FakeControllers = field(init=False)
    _watches: set[asyncio.Task[Any]] = field(default_factory=set)
    _ends: asyncio.Event = field(default_factory=asyncio.Event)
    _runner: web.AppRunner | None = None

    def __post_init__(self) -> None:
        self.controllers = FakeControllers(self.store, self.node, self.second)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    # ── controls for tests ──────────────────────────────────────────────────────────────────────────────────

    async def listen(self) -> None:
        """Start to accept requests, on the same port as before if there was one."""
        application = web.Application(client_max_size=2**24)
        application.router.add_route("*", "/{path:.*}", self.answer)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
        await site.start()
        sockets = site._server.sockets  # type: ignore[union-attr] # noqa: SLF001 - there is no public way to a free port
        self.port = sockets[0].getsockname()[1]

    async def go_down(self) -> None:
        """Refuse connections; objects and pods stay."""
        assert self._runner is not None
        self.cut_watches()
        await self._runner.cleanup()

    def end_watches(self) -> None:
        """End all open watches in the normal way, as at their timeout."""
        self._ends.set()
        self._ends = asyncio.Event()

    def cut_watches(self) -> None:
        """Break the connections of all open watches."""
        for watch in tuple(self._watches):
            watch.cancel()

    def lose_etcd(self) -> None:
        """Fail every request and break every stream, as while etcd is away."""
        self.outage = KubernetesError(500, "InternalError", "etcdserver: request timed out")
        self.cut_watches()

    def restart_etcd(self) -> None:
        """Answer requests again after `lose_etcd`; earlier resource versions can't be watched any more."""
        self.store.forget()
        self.outage = None

    @property
    def watches(self) -> int:
        return len(self._watches)

    # ── requests ──────────────────────────────────────────────────────────────────────────────────────────

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """Answer a request as the real server would, or by the fault that the fields ask for."""
        self.requests.append(f"{request.method} {request.path_qs}")
        raw = await request.read()
        if self.is_silent:
            await asyncio.Event().wait()
        try:
            if self.failures:
                raise self.failures.pop(0)
            if self.outage is not None:
                raise self.outage
            refused = self.refuses(request.method, request.path_qs)
            if refused is not None:
                raise refused
            target = _parse_target(request.path)
            self._authorize(request, target)
            if request.method == "GET":
                return await self._read(request, target)
            status, body = self._write(request, target, raw)
            return web.json_response(body, status=status)
        except KubernetesError as refused:
            return web.json_response(refused.body, status=refused.status, headers=refused.headers)

    def _authorize(self, request: web.Request, target: ApiTarget) -> None:
        """Raise `KubernetesError` for a wrong token, an anonymous request, and an impersonated user."""
        given = request.headers.get("Authorization")
        if given is not None and given != f"Bearer {self.token}":
            raise KubernetesError(401, "Unauthorized", "Unauthorized")
        user = "system:anonymous" if given is None else request.headers.get("Impersonate-User")
        if user is not None:
            group = target.kind.group_version.rpartition("/")[0]
            message = (
                f'{target.kind.resource} is forbidden: User "{user}" cannot {_request_verb(request, target)} resource '
                f'"{target.kind.plural}" in API group "{group}" in the namespace "{target.namespace}"'
            )
            raise KubernetesError(403, "Forbidden", message)

    async def _read(self, request: web.Request, target: ApiTarget) -> web.StreamResponse:
        """Answer a GET request: an object, its scale or log, a list, or a watch."""
        if not target.name:
            if request.query.get("watch") in {"true", "1"}:
                return await self._watch(request, target)
            return web.json_response(self._list(request.query, target))
        if target.subresource == "log":
            return web.Response(text=self.controllers.log_of(target.namespace, target.name, request.query))
        found = self.store.get(target.kind, target.namespace, target.name)
        return web.json_response(_scale(found) if target.subresource == "scale" else found)

    def _write(self, request: web.Request, target: ApiTarget, raw: bytes) -> tuple[int, Json]:
        """Carry out a POST, PUT, PATCH or DELETE; return status and body of the answer."""
        query = request.query
        manager = FieldManager(query.get("fieldManager", "unknown"), "Update", target.subresource)
        is_dry = query.get("dryRun") == "All"
        match request.method:
            case "POST":
                body = self._decode_body(target, raw, query)
                return 201, self.store.create(target.kind, target.namespace, body, manager, is_dry=is_dry)
            case "PUT":
                body = self._decode_body(target, raw, query)
                return 200, self._put(target, body, manager, is_dry=is_dry)
            case "PATCH":
                return self._patch(request, target, raw, manager, is_dry=is_dry)
            case "DELETE":
                return 200, self._delete(target, json.loads(raw) if raw else {}, query)
        raise KubernetesError(
            405, "MethodNotAllowed", "the server does not allow this method on the requested resource"
        )

    def _decode_body(
        self, target: ApiTarget, raw: bytes, query: Mapping[str, str], *, by_apply: bool = False
    ) -> Json:
        """Return the object in a request's body; raises `KubernetesError` for wrong JSON,
        version, types or namespace.
        """
        kind = SCALE if target.subresource == "scale" else target.kind
        try:
            body: Json = json.loads(raw)
        except ValueError as error:
            raise bad_request_error("the object provided is unrecognized") from error
        if by_apply and not (body.get("apiVersion") and body.get("kind")):
            raise bad_request_error("invalid object type: /, Kind=")
        if body.get("apiVersion", kind.group_version) != kind.group_version:
            raise bad_request_error(
                f"the API version in the data ({body['apiVersion']}) does not match the expected API version "
                f"({kind.group_version})"
            )
        self._check_types(kind, body, by_apply=by_apply, is_strict=query.get("fieldValidation") == "Strict")
        namespace = body.get("metadata", {}).get("namespace")
        if namespace not in {None, "", target.namespace}:
            raise bad_request_error(
                "the namespace of the provided object does not match the namespace sent on the request"
            )
        return body

    def _check_types(
        self, kind: ObjectKind, body: Json, *, by_apply: bool = False, is_strict: bool = False
    ) -> None:
        """Raise `KubernetesError` for fields of wrong types, and for unknown fields in a strict request or an apply."""
        wrong = schema.wrong_types(kind, body)
        if wrong:
            raise bad_request_error(
                f'{kind.name} in version "v1" cannot be handled as a {kind.name}: {wrong[0]}'
            )
        unknown = schema.unknown_fields(kind, body)
        if unknown and by_apply:
            raise KubernetesError(
                500,
                "",
                f"failed to create typed patch object (/{body.get('metadata', {}).get('name')}; "
                f"{kind.group_version}, Kind={kind.name}): .{unknown[0]}: field not declared in schema",
            )
        if unknown and is_strict:
            raise bad_request_error(
                f'{kind.name} in version "v1" cannot be handled as a {kind.name}: strict decoding error: '
                f'unknown field "{unknown[0]}"'
            )

    def _put(self, target: ApiTarget, body: Json, manager: FieldManager, *, is_dry: bool) -> Json:
        if target.subresource == "scale":
            return self._write_scale(target, body, manager)
        is_status = target.subresource == "status"
        return self.store.replace(
            target.kind, target.namespace, target.name, body, manager, is_dry=is_dry, only_status=is_status
        )

    def _patch(
        self, request: web.Request, target: ApiTarget, raw: bytes, manager: FieldManager, *, is_dry: bool
    ) -> tuple[int, Json]:
        """Apply a patch of any kind to an object; return status and body of the answer."""
        content_type = request.content_type
        if content_type == _APPLY:
            return self._apply(request, target, raw, is_dry=is_dry)
        if content_type not in _PATCHES:
            raise KubernetesError(415, "UnsupportedMediaType", "415: Unsupported Media Type")
        found = self.store.get(target.kind, target.namespace, target.name)
        present = _scale(found) if target.subresource == "scale" else found
        # A patch without a resource version applies to any version.
        version = present["metadata"].pop("resourceVersion")
        patched = _PATCHES[content_type](present, json.loads(raw))
        if patched["metadata"].get("resourceVersion", version) != version:
            raise conflict_error(target.kind.resource, target.name)
        if target.subresource == "scale":
            return 200, self._write_scale(target, patched, manager)
        self._check_types(target.kind, patched)
        return 200, self._put(target, patched, manager, is_dry=is_dry)

    def _apply(
        self, request: web.Request, target: ApiTarget, raw: bytes, *, is_dry: bool
    ) -> tuple[int, Json]:
        """Apply a configuration for its field manager; return 201 if that created the object,
        else 200, and the object.
        """
        query = request.query
        name = query.get("fieldManager")
        if not name:
            problem = "fieldManager: Required value: is required for apply patch"
            raise invalid_error("PatchOptions.meta.k8s.io", "", [problem])
        config = self._decode_body(target, raw, query, by_apply=True)
        if "managedFields" in config.get("metadata", {}):
            raise bad_request_error("metadata.managedFields must be nil")
        applied, is_new = self.store.apply(
            target.kind,
            target.namespace,
            target.name,
            config,
            FieldManager(name, "Apply", target.subresource),
            is_forced=query.get("force") == "true",
            is_dry=is_dry,
        )
        return 201 if is_new else 200, applied

    def _write_scale(self, target: ApiTarget, body: Json, manager: FieldManager) -> Json:
        """Set the replicas of a Deployment through its scale, and return that."""
        found = self.store.get(target.kind, target.namespace, target.name)
        version = body.get("metadata", {}).get("resourceVersion")
        if version and version != found["metadata"]["resourceVersion"]:
            raise conflict_error(target.kind.resource, target.name)
        replicas = body.get("spec", {}).get("replicas", 0)
        if replicas < 0:
            problem = f"spec.replicas: Invalid value: {replicas}: must be greater than or equal to 0"
            raise invalid_error("Scale.autoscaling", target.name, [problem])
        self.store.set_replicas(target.namespace, target.name, replicas, manager)
        return _scale(self.store.get(target.kind, target.namespace, target.name))

    def _delete(self, target: ApiTarget, options: Json, query: Mapping[str, str]) -> Json:
        """Delete an object, or all that the query selects, and return the body of the answer."""
        kind = target.kind
        options = {"propagationPolicy": query.get("propagationPolicy"), **options}
        if not target.name:
            for found in self._matching(query, target):
                self.store.delete(kind, target.namespace, found["metadata"]["name"], options)
            return {"kind": f"{kind.name}List", "apiVersion": kind.group_version, "metadata": {}, "items": []}
        deleted = self.store.delete(kind, target.namespace, target.name, options)
        if kind.returns_object_on_delete or "deletionTimestamp" in deleted["metadata"]:
            return deleted
        return {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}

    # ── lists and watches ─────────────────────────────────────────────────────────────────────────────────

    def _matching(self, query: Mapping[str, str], target: ApiTarget) -> list[Json]:
        matches = _label_selector(query)
        every = self.store.every(target.kind.plural, target.namespace if target.kind.is_namespaced else None)
        names = [found["metadata"]["name"] for found in every if matches(found)]
        return [self.store.get(target.kind, target.namespace, name) for name in names]

    def _list(self, query: Mapping[str, str], target: ApiTarget) -> Json:
        """Return a list of objects, as a page if the query or the server limits it."""
        items = self._matching(query, target)
        version, start = self.store.version, ""
        if "continue" in query:
            version, start = self._read_continue_token(query["continue"])
        items = [item for item in items if item["metadata"]["name"] > start]
        metadata: Json = {"resourceVersion": str(version)}
        sizes = [size for size in (int(query.get("limit", "0")), self.page_size) if size]
        if sizes and len(items) > min(sizes):
            rest = len(items) - min(sizes)
            items = items[: min(sizes)]
            metadata["continue"] = _continue_token(version, items[-1]["metadata"]["name"])
            metadata["remainingItemCount"] = rest
        for item in items:
            del item["kind"], item["apiVersion"]
        kind = target.kind
        return {
            "kind": f"{kind.name}List",
            "apiVersion": kind.group_version,
            "metadata": metadata,
            "items": items,
        }

    def _read_continue_token(self, token: str) -> tuple[int, str]:
        """Return the version and the last name of a continue token; raises
        `KubernetesError` for a wrong or expired one.
        """
        try:
            decoded = json.loads(base64.b64decode(token, validate=True))
            version, start = int(decoded["v"]), str(decoded["start"])
        except (binascii.Error, ValueError, KeyError, TypeError) as error:
            raise bad_request_error(f"invalid continue token: continue key is not valid: {error}") from error
        if version < self.store.forgotten:
            message = "The provided continue parameter is too old to display a consistent list result."
            raise KubernetesError(
                410, "Expired", message, **{"continue": _continue_token(self.store.version, start)}
            )
        return version, start

    async def _watch(self, request: web.Request, target: ApiTarget) -> web.StreamResponse:
        """Stream the changes of a kind until the timeout of the query, the end of watches, or the client's end."""
        query = request.query
        asked = query.get("resourceVersion", "")
        if not (asked or "0").isdigit():
            message = f'resourceVersion: Invalid value: "{asked}": strconv.ParseUint: parsing "{asked}": invalid syntax'
            raise KubernetesError(500, "", message)
        matches = _label_selector(query)
        response = web.StreamResponse(headers={"Content-Type": _JSON, "Transfer-Encoding": "chunked"})
        response.enable_chunked_encoding()
        await response.prepare(request)
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        seconds = float(query["timeoutSeconds"]) * self.second if "timeoutSeconds" in query else None
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stream(response, query, target, matches)
            await response.write_eof()
        except asyncio.CancelledError:
            if request.transport is not None:
                request.transport.abort()
            raise
        except ConnectionError:
            pass  # the client has gone
        finally:
            self._watches.discard(task)
        return response

    async def _stream(
        self,
        response: web.StreamResponse,
        query: Mapping[str, str],
        target: ApiTarget,
        matches: Callable[[Json], bool],
    ) -> None:
        """Send the present objects, if asked for, and then each change that matches, until watches are ended."""

        async def send(change: str, found: Json) -> None:
            await response.write(json.dumps({"type": change, "object": found}).encode() + b"\n")

        ends = self._ends
        asked = int(query.get("resourceVersion") or "0")
        sent = asked or self.store.version
        if asked and asked < self.store.forgotten:
            message = f"too old resource version: {asked} ({self.store.forgotten})"
            await send("ERROR", KubernetesError(410, "Expired", message).body)
            return
        if not asked:
            for found in self._matching(query, target):
                await send("ADDED", found)
        if query.get("sendInitialEvents") == "true":
            annotations = {"k8s.io/initial-events-end": "true"}
            bookmark = {"metadata": {"resourceVersion": str(sent), "annotations": annotations}}
            kind = {"kind": target.kind.name, "apiVersion": target.kind.group_version}
            await send("BOOKMARK", {**kind, **bookmark})
        ended = asyncio.create_task(ends.wait())
        try:
            while not ended.done():
                changed = asyncio.create_task(self.store.wait_for_change())
                try:
                    for event in self._events_after(sent, target):
                        sent = event.version
                        if matches(event.object):
                            await send(event.type, event.object)
                    await asyncio.wait((changed, ended), return_when=asyncio.FIRST_COMPLETED)
                finally:
                    changed.cancel()
        finally:
            ended.cancel()

    def _events_after(self, version: int, target: ApiTarget) -> list[WatchEvent]:
        return [
            event
            for event in self.store.events
            if event.version > version
            and event.key[0] == target.kind.plural
            and event.key[1] in {target.namespace, ""}
        ]


def _parse_target(path: str) -> ApiTarget:
    match = _NAMESPACE_PATH.match(path) or _PATH.match(path)
    found = match.groupdict() if match is not None else {}
    kind = KINDS.get(found.get("plural") or "")
    group = (found.get("group") or "/api/v1").removeprefix("/apis/").removeprefix("/api/")
    if kind is None or group != kind.group_version:
        raise KubernetesError(404, "NotFound", "the server could not find the requested resource")
    return ApiTarget(
        kind, found.get("namespace") or "", found.get("name") or "", found.get("subresource") or ""
    )


def _request_verb(request: web.Request, target: ApiTarget) -> str:
    verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete", "GET": "get"}
    return "list" if request.method == "GET" and not target.name else verbs[request.method]


def _scale(found: Json) -> Json:
    """Return the Scale of a Deployment; its specification omits zero."""
    labels = found["spec"]["selector"].get("matchLabels", {})
    replicas = found["spec"]["replicas"]
    metadata = {
        name: value
        for name, value in found["metadata"].items()
        if name in {"name", "namespace", "uid", "resourceVersion", "creationTimestamp"}
    }
    selector = ",".join(f"{name}={value}" for name, value in labels.items())
    return {
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": metadata,
        "spec": {"replicas": replicas} if replicas else {},
        "status": {"replicas": found.get("status", {}).get("replicas", 0), "selector": selector},
    }


def _label_selector(query: Mapping[str, str]) -> Callable[[Json], bool]:
    """Return a function that tells whether an object matches the label and field selectors of a query."""
    labels = _parse_requirements(query.get("labelSelector", ""))
    desired = _parse_requirements(query.get("fieldSelector", ""))
    for name, _, _ in desired:
        if name not in {"metadata.name", "metadata.namespace"}:
            known = '"metadata.name", "metadata.namespace"'
            raise bad_request_error(f'"{name}" is not a known field selector: only {known}')

    def matches(found: Json) -> bool:
        metadata = found["metadata"]
        present = metadata.get("labels") or {}
        return all((present.get(name) == value) is is_equal for name, is_equal, value in labels) and all(
            (metadata.get(name.removeprefix("metadata.")) == value) is is_equal
            for name, is_equal, value in desired
        )

    return matches


def _parse_requirements(text: str) -> list[tuple[str, bool, str]]:
    found = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        match = _REQUIREMENT.match(part)
        if match is None:
            raise bad_request_error(
                f"unable to parse requirement: found '{part}', expected: in, notin, =, ==, !=, gt, lt"
            )
        found.append((match["key"], match["operator"] != "!=", match["value"]))
    return found


def _continue_token(version: int, start: str) -> str:
    return base64.b64encode(json.dumps({"v": version, "start": start}).encode()).decode()


@asynccontextmanager
async def serve_fake_api(**settings: Any) -> AsyncIterator[FakeApiServer]:  # noqa: ANN401 - the fields of FakeApi
    """Serve an API server with its controllers on a free port during the block; `settings` are its fields."""
    api = FakeApiServer(**settings)
    await api.listen()
    await api.controllers.start()
    try:
        yield api
    finally:
        await api.controllers.stop()
        await api.go_down()
