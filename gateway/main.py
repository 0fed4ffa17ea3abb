"""Assembly of the gateway process: the application, its server, and the limits of its connections."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, nullcontext
from functools import cache, partial
from typing import Any, cast

import structlog
import uvicorn
import uvloop
from starlette.applications import Starlette
from starlette.types import ASGIApp

from concurrency import gc_tuning, heartbeat
from gateway import routes, state
from gateway.deployments.routes import TRIGGER
from gateway.http.byte_budget import ByteBudget
from gateway.http.connection_budget import ConnectionBudget, connections_for
from gateway.http.edge import CrossOriginLayer, EdgeLayer, PathRoute, PathRouter, WorkflowHostRouter
from gateway.http.endpoint import answer_unrouted
from gateway.http.protocol import BoundedProtocol, ConnectionBounds
from gateway.http.proxies import TrustedProxies
from gateway.pods import routes as internal_routes
from gateway.settings import GatewaySettings
from gateway.state import StateFactory
from models.descriptor_limits import raise_descriptor_limit
from telemetry.exporter import serve_metrics
from telemetry.trace_export import run_tracer

log = structlog.get_logger()

KEEP_ALIVE_SECONDS = 75
"""Longer than the minute for which load balancers keep idle connections, so that they close first."""


class GatewayApplication(Starlette):
    """Starlette application with its own route table. `Endpoint` catches errors, so no middleware layers do."""

    def build_middleware_stack(self) -> ASGIApp:
        """Return the application: the routes with the layers for request ids, metrics, CORS and hosts of workflows.

        Handlers find the router of the paths as `state.router`, and the OpenAPI document of the route table by
        `state.build_document`.
        """
        router, trigger = _route_paths()
        self.state.router = router
        self.state.build_document = _build_document
        hosts = WorkflowHostRouter(router, trigger=trigger, default=answer_unrouted)
        return CrossOriginLayer(EdgeLayer(hosts, others=self.router))


@cache
def _route_paths() -> tuple[PathRouter, PathRoute]:
    """Return the router of all paths, and the route of a workflow's trigger; those of all applications of a process."""
    served: dict[str, ASGIApp] = {
        **routes.endpoints([*routes.TABLE, *routes.ALIASES, *routes.FOR_BROWSERS]),
        **internal_routes.endpoints(internal_routes.TABLE),
    }
    return PathRouter(served, default=answer_unrouted), PathRoute(TRIGGER, served[TRIGGER])


@cache
def _build_document(server_url: str) -> dict[str, Any]:
    from gateway.openapi import openapi_document  # noqa: PLC0415 - few processes render the document

    return openapi_document.build_document(routes.TABLE, server=server_url or openapi_document.ANY_SERVER)


def create_app(open_state: StateFactory) -> Starlette:
    """Return the application of the gateway; while it runs, it holds the state that `open_state` opens and closes."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with open_state() as app.state.gateway:
            yield

    return GatewayApplication(lifespan=lifespan)


def serve(settings: GatewaySettings) -> None:
    """Serve the API until a signal stops the process.

    Raises `InvalidSettings` for a missing or unsafe setting with which only `pilotflame dev` may start.
    """
    settings.check_for_production()
    uvloop.run(_serve(settings))


async def _serve(settings: GatewaySettings) -> None:
    """Serve the API, with metrics, heartbeat file and tracer, on the configured or an inherited socket until
    a signal stops it.
    """
    # Opened here, not by the application's lifespan: Uvicorn would wrap a failure to open in a traceback.
    async with (
        heartbeat.run_heartbeat(settings.heartbeat_file),
        serve_metrics(settings.metrics_address, settings.metrics_port),
        run_tracer(settings, "gateway"),
        state.open_state(settings) as opened,
    ):
        if not settings.public_url:
            effect = "URLs of triggers name the address of each request"
            log.warning("PILOTFLAME_PUBLIC_URL is not set", effect=effect)
        server = build_server(create_app(lambda: nullcontext(opened)), settings)
        inherited = None if settings.listen_fd is None else [socket.socket(fileno=settings.listen_fd)]
        await server.serve(sockets=inherited)


class GatewayServer(uvicorn.Server):
    """Uvicorn server that freezes loaded objects, so that full garbage collections don't pause it."""

    before_shutdown: Callable[[], Awaitable[None]] | None = None
    """Callback for work that still needs the gateway's state; awaited before the shutdown."""

    proxies: TrustedProxies | None = None
    """Trusted proxies; their host names are resolved again and again while the server runs."""
    _proxy_refresh: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start the server, begin to resolve the host names of proxies, and freeze loaded objects for the
        garbage collector.
        """
        if self.proxies is not None and self.proxies.has_names:
            self._proxy_refresh = asyncio.create_task(self.proxies.follow())
        await super().startup(sockets)
        gc_tuning.freeze_loaded(asyncio.get_running_loop())

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop the server: end all waits of requests first, so that no long poll keeps the process alive."""
        if self._proxy_refresh is not None:
            self._proxy_refresh.cancel()
        if self.before_shutdown is not None:
            await self.before_shutdown()
        # Otherwise long polls would hold their connections open, and with them the process.
        app = self.config.app
        if isinstance(app, GatewayApplication) and hasattr(app.state, "gateway"):
            app.state.gateway.waiting.release()
            app.state.gateway.live_hints.release()
            app.state.gateway.activation.release()
            app.state.gateway.task_hub.release()
            app.state.gateway.pod_services.poll_hub.release()
        await super().shutdown(sockets)


def bounds_of(settings: GatewaySettings) -> ConnectionBounds:
    """Raise this process's limit of file descriptors as far as possible, and return the limits of a server's
    connections.

    By default there are as many connections as the descriptors allow; a larger configured number is lowered with a
    warning. One client may have half of them.
    """
    most = connections_for(raise_descriptor_limit())
    connections = settings.max_connections or most
    if connections > most:
        log.warning("fewer connections than PILOTFLAME_MAX_CONNECTIONS: raise `ulimit -n`", connections=most)
        connections = most
    return ConnectionBounds(
        connections=ConnectionBudget(connections),
        max_requests_per_client=max(connections // 2, 1),
        bodies=ByteBudget(settings.bodies_bytes, share_bytes=settings.body_share_bytes),
        proxies=TrustedProxies(settings.trusted_proxies),
        head_seconds=settings.head_seconds,
        body_seconds=settings.body_seconds,
        stall_seconds=settings.stall_seconds,
    )


def build_server(app: ASGIApp, settings: GatewaySettings) -> GatewayServer:
    """Return a server for an application, ready to run, with the connection limits of the settings."""
    bounds = bounds_of(settings)
    server = GatewayServer(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            loop="uvloop",
            # Called as the class would be. It reads `X-Forwarded-For` itself, before the bytes of a body are
            # counted.
            http=cast("type[BoundedProtocol]", partial(BoundedProtocol, bounds)),
            proxy_headers=False,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=settings.shutdown_seconds,
        )
    )
    server.proxies = bounds.proxies
    return server
