"""State of the gateway that serves the pods of deployments."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from msgspec import Struct

from execution.approval_link_urls import ApprovalLinkUrls
from execution.callback_urls import CallbackUrls
from execution.child_runs import ChildRunStarter
from execution.event_matching import EventMatcher
from execution.message_signer import MessageSigner
from execution.shared_throttle import SharedThrottle
from execution.signal_waits import SignalWaits
from execution.state_publisher import StatePublisher
from execution.stored_data_sources import StoredDataSources
from execution.stored_models import StoredModels
from gateway.pods.pod_answers import PodAnswers
from gateway.pods.pod_authentication import PodAuthenticator
from gateway.pods.poll_hub import PodPollHub
from journal import log_levels
from messages.message_seal import MessageSeal

if TYPE_CHECKING:
    from gateway.settings import GatewaySettings
    from journal.store import JournalStore
    from messages.broker import Broker
    from models.database import Database
    from models.encryption import SecretVault
    from nodes.catalog import NodeCatalog


class PodApiServices(Struct, frozen=True):
    """Services of the internal API. Workers offer the same node services by the same code."""

    authenticator: PodAuthenticator
    poll_hub: PodPollHub
    sources: StoredDataSources
    models: StoredModels
    runs: ChildRunStarter
    throttle: SharedThrottle
    events: EventMatcher
    signals: SignalWaits
    state: StatePublisher
    approvals: ApprovalLinkUrls
    callbacks: CallbackUrls
    answers: PodAnswers
    log_levels: Mapping[str, str]
    """Log levels by workflow, as they are now."""


@asynccontextmanager
async def open_pod_services(
    settings: GatewaySettings,
    database: Database,
    store: JournalStore,
    broker: Broker,
    catalog: NodeCatalog,
    vault: SecretVault,
    poll_hub: PodPollHub,
) -> AsyncIterator[PodApiServices]:
    """Open the services that pods call, and accept their polls while the context lasts; then close them."""
    stack = AsyncExitStack()
    sources = StoredDataSources(database, vault)
    answers = PodAnswers(database, broker, MessageSeal.from_settings(settings, database.clock))
    await poll_hub.start()
    await answers.start()
    try:
        yield PodApiServices(
            authenticator=PodAuthenticator(database),
            poll_hub=poll_hub,
            sources=sources,
            models=StoredModels(database, sources),
            runs=ChildRunStarter(database, store, broker, catalog, settings),
            throttle=SharedThrottle(database),
            events=EventMatcher(database, broker),
            signals=SignalWaits(database, broker),
            state=StatePublisher(database),
            approvals=ApprovalLinkUrls(database, settings.secret, settings.public_url),
            callbacks=CallbackUrls(MessageSigner(database, vault), settings.secret, settings.public_url),
            answers=answers,
            log_levels=await stack.enter_async_context(log_levels.follow_log_levels(database)),
        )
    finally:
        await stack.aclose()
        await poll_hub.close()
