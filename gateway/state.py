"""What the gateway holds while it runs: opened when it starts, handed to every handler, closed when it ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TypeAlias

from execution.event_matching import EventMatcher
from gateway.arrivals.certificates import MAX_ANSWER_BYTES, Certificates
from gateway.arrivals.deliveries import Deliveries
from gateway.arrivals.event_telling import EventTelling
from gateway.arrivals.samples import Samples
from gateway.arrivals.sender import Doorkeeper
from gateway.arrivals.subscribers import Subscribers
from gateway.bootstrap import bootstrap
from gateway.data_sources.data_source_probes import Probes
from gateway.deployments.activation import Activation
from gateway.deployments.deployed_definitions import DeployedDefinitions
from gateway.deployments.pod_logs import PodLogs
from gateway.executions.acceptance import Acceptances
from gateway.executions.backlog import Backlog
from gateway.executions.execution_access import ExecutionAccess
from gateway.executions.large_outputs import LargeOutputs
from gateway.executions.live_events import LiveEvents
from gateway.executions.rates import Rates
from gateway.executions.waiting import Waiting
from gateway.http.auth import Authenticator
from gateway.http.failed_attempts import PasswordAttempts
from gateway.internal import runners
from gateway.internal.desk import Desk
from gateway.internal.forwarding import Forwarder
from gateway.internal.runners import Runners
from gateway.settings import GatewaySettings
from gateway.workflows.workflow_cache import WorkflowCache
from journal import clock_sync
from journal.blobs.blob_store import BlobStore
from journal.blobs.blob_store_factory import open_blobs
from journal.store import JournalStore
from journal.store_factory import open_store
from messages import broker as brokers
from messages.broker import Broker
from models import database as databases
from models import schema_migration
from models.database import Database
from models.encryption import SecretVault
from nodes import catalog as catalogs
from nodes.catalog import NodeCatalog
from nodes.outbound_http import OutboundClient, OutboundPolicy
from nodes.sandbox.form_checks import FormChecker


@dataclass(frozen=True, slots=True)
class State:
    """The parts that handlers use."""

    settings: GatewaySettings
    database: Database
    clock: Callable[[], datetime]
    """The database's time, by this process's `DatabaseClock`."""
    store: JournalStore
    blobs: BlobStore
    broker: Broker
    catalog: NodeCatalog
    authenticator: Authenticator
    doorkeeper: Doorkeeper
    deliveries: Deliveries
    samples: Samples
    subscribers: Subscribers
    workflows: WorkflowCache
    acceptances: Acceptances
    rates: Rates
    backlog: Backlog
    activation: Activation
    deployed: DeployedDefinitions
    waiting: Waiting
    access: ExecutionAccess
    live_events: LiveEvents
    large_outputs: LargeOutputs
    vault: SecretVault
    probes: Probes
    forms: FormChecker
    runners: Runners
    pod_logs: PodLogs
    certificates: Certificates
    mail_attempts: PasswordAttempts
    """Passwords that were tried with mails."""


StateFactory: TypeAlias = Callable[[], AbstractAsyncContextManager[State]]


@asynccontextmanager
async def opened(settings: GatewaySettings) -> AsyncIterator[State]:
    """Open everything for a process of its own."""
    async with AsyncExitStack() as stack:
        url = databases.parse_url(settings.database_url)
        database = Database(url)
        stack.push_async_callback(database.close)
        await schema_migration.require_current(database)
        store = await open_store(url, clock=database.clock, connections=settings.run_path_connections)
        stack.push_async_callback(store.close)
        broker = await brokers.connect(settings.redis_url)
        stack.push_async_callback(broker.close)
        await stack.enter_async_context(clock_sync.run_clock_sync(database))
        yield await stack.enter_async_context(assembled(settings, database, store, broker))


@asynccontextmanager
async def assembled(
    settings: GatewaySettings, database: Database, store: JournalStore, broker: Broker
) -> AsyncIterator[State]:
    """Make the gateway's own parts around what the process may share with other roles, which stays open."""
    if settings.bootstrap_api_key is not None:
        await bootstrap(database, settings.bootstrap_api_key.get_secret_value(), settings.secret)
    catalog = catalogs.load_catalog()
    blobs = open_blobs(settings)
    authenticator = Authenticator(database, settings.secret, settings.previous_secrets)
    doorkeeper = Doorkeeper(database, authenticator)
    deliveries = Deliveries(database)
    samples = Samples(database)
    subscribers = Subscribers(database)
    vault = SecretVault(settings.secret, settings.previous_secrets)
    waiting = Waiting(store, broker)
    desk = Desk(database, broker, Forwarder(database, broker))
    awaited = EventMatcher(database, broker)
    telling = EventTelling(awaited)
    acceptances = Acceptances(database, store, broker, waiting, desk, telling)
    rates = Rates(broker, settings)
    backlog = Backlog(database, settings)
    activation = Activation(database, broker, waiting)
    access = ExecutionAccess(database)
    workflows = WorkflowCache(database, catalog)
    live_events = LiveEvents(
        database, waiting, authenticator, access, LargeOutputs(blobs, settings.public_url)
    )
    forms = FormChecker()
    pod_logs = PodLogs(broker)
    # Behind an endpoint of a VPC, the address of SNS is a private one.
    to_sns = OutboundPolicy(
        allowed_networks=settings.outbound_allowed_networks, max_response_bytes=MAX_ANSWER_BYTES
    )
    certificates = Certificates(OutboundClient(to_sns))
    await waiting.start()
    await pod_logs.start()
    await activation.start()
    try:
        async with runners.opened(settings, database, store, broker, catalog, vault, desk) as for_pods:
            yield State(
                settings=settings,
                database=database,
                store=store,
                blobs=blobs,
                broker=broker,
                catalog=catalog,
                authenticator=authenticator,
                doorkeeper=doorkeeper,
                deliveries=deliveries,
                samples=samples,
                subscribers=subscribers,
                workflows=workflows,
                acceptances=acceptances,
                rates=rates,
                backlog=backlog,
                activation=activation,
                deployed=DeployedDefinitions(database, catalog),
                waiting=waiting,
                access=access,
                live_events=live_events,
                large_outputs=live_events.large_outputs,
                vault=vault,
                probes=Probes(vault, settings, database.clock),
                forms=forms,
                runners=for_pods,
                pod_logs=pod_logs,
                certificates=certificates,
                clock=database.clock.now,
                mail_attempts=PasswordAttempts("Too many mails from this address had a wrong password"),
            )
    finally:
        await acceptances.drain()
        await telling.drain()
        await rates.drain()
        await backlog.close()
        await activation.close()
        await waiting.close()
        await live_events.close()
        await certificates.close()
        await blobs.close()
        await forms.close()
        await workflows.close()
        await deliveries.drain()
        await samples.drain()
        await subscribers.drain()
        await doorkeeper.close()
        await authenticator.close()
