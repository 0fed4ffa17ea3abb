"""Calls of language models, in a form that all providers share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, Self, TypeAlias

import msgspec

from engine.run_errors import NodeError

JSON_RULES_TOKENS: Final = 150
"""Most tokens of the rules by which a model calls tools by JSON, besides the tools themselves."""
OVERHEAD_TOKENS: Final = 100
"""Tokens of a request beside its texts: markers of messages, and words that ask for a schema."""

TokenCount: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=100_000_000)]
"""Tokens of one call. Counts that a provider makes up, or a pod, must not exceed the columns of databases."""
Nanodollars: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=10**17)]


Milliseconds: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=10**12)]


class ModelProvider(StrEnum):
    """Protocol of a provider."""

    OPENAI_COMPATIBLE = "openai-compatible"
    """Chat completions as OpenAI defined them."""
    ANTHROPIC = "anthropic"
    """Messages as Anthropic defined them."""
    ECHO = "echo"
    """Built in: it answers with the question."""


class MessageRole(StrEnum):
    """Author of a message."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"


class FinishReason(StrEnum):
    """Reason why a model ended its answer."""

    STOP = "stop"
    LENGTH = "length"
    """The answer has reached its maximum length."""
    TOOL_CALLS = "tool-calls"
    REFUSAL = "refusal"
    """The model or its provider has refused to answer."""
    OTHER = "other"


class ToolMode(StrEnum):
    """Way in which a model calls tools."""

    AUTO = "auto"
    """By the result of the model's test; native for a model that was never tested."""
    NATIVE = "native"
    """By the tool calls of its provider's protocol."""
    JSON = "json"
    """By an answer with JSON, which is a call or the final answer."""


class RequestedToolCall(msgspec.Struct, frozen=True):
    """Tool call that a model asks for."""

    id: str
    """Id that the result names; unique within the answer."""
    name: str
    arguments: Mapping[str, Any] | None
    """None if they are no JSON object."""
    problem: str = ""
    """Reason why the arguments can't be used, for the model."""


class ProviderContent(msgspec.Struct, frozen=True):
    """Content of an answer in the form of its provider, such as signed thoughts, for the model that wrote it.

    Providers refuse the next request of a conversation with tools without it.
    """

    model_id: str
    parts: Sequence[Mapping[str, Any]]


class ChatMessage(msgspec.Struct, frozen=True):
    """Message of a conversation."""

    role: MessageRole
    content: str
    tool_calls: Sequence[RequestedToolCall] = ()
    """Only of the assistant."""
    tool_call_id: str = ""
    """Only of a tool: the call that the content answers."""
    provider_content: ProviderContent | None = None
    """Only of the assistant: sent in place of the other fields to the model that wrote it."""


class ToolDescription(msgspec.Struct, frozen=True):
    """Tool that a model may call."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON Schema of an object."""


class ChatRequest(msgspec.Struct, frozen=True):
    """Question to a model."""

    messages: Sequence[ChatMessage]
    max_tokens: int
    """Maximum length of the answer."""
    temperature: float | None = None
    """None for the default of the provider."""
    output_schema: Mapping[str, Any] | None = None
    """JSON Schema of the answer; None for a text."""
    tools: Sequence[ToolDescription] = ()
    forced_tool: str = ""
    """Tool that the model has to call; empty if it may choose."""
    tool_mode: ToolMode = ToolMode.AUTO
    final_schema: Mapping[str, Any] | None = None
    """JSON Schema of an answer that calls no tool, for models that call tools by JSON; others know it from the prompt.

    None for a text.
    """


class TokenUsage(msgspec.Struct, frozen=True, rename="camel"):
    """Tokens of a call. Those of caches and of reasoning are parts of the totals."""

    input_tokens: TokenCount
    output_tokens: TokenCount
    cache_read_tokens: TokenCount = 0
    cache_write_tokens: TokenCount = 0
    reasoning_tokens: TokenCount = 0
    is_estimated: bool = False
    """Whether the provider has reported nothing, so that the totals are estimated from the texts."""


class ChatAnswer(msgspec.Struct, frozen=True):
    """Complete answer of a model."""

    text: str
    finish_reason: FinishReason
    usage: TokenUsage
    model: str
    """Model that the provider names, which may be more specific than the requested one."""
    tool_calls: Sequence[RequestedToolCall] = ()
    provider_content: ProviderContent | None = None
    """Content that the message in the next request repeats; None if text and tool calls are all."""
    is_streamed: bool = False
    """Whether it came as a stream of events, and not as one document."""


class ModelBudget(
    msgspec.Struct, frozen=True, rename="camel", omit_defaults=True, forbid_unknown_fields=True
):
    """Limits of the total cost of the calls of a node or a run; None: no limit."""

    max_cost: (
        Annotated[
            str,
            msgspec.Meta(
                pattern=r"^[0-9]{1,9}([.][0-9]{1,9})?$",
                description="US dollars as a decimal text such as `0.5`. The called models need a price.",
            ),
        ]
        | None
    ) = None
    max_tokens: (
        Annotated[
            int,
            msgspec.Meta(ge=1, le=1_000_000_000, description="Tokens of input and output together."),
        ]
        | None
    ) = None


class NodeSpending(msgspec.Struct, frozen=True):
    """Node whose budget pays for the call of a model."""

    node: str
    """Node and iteration, whose calls share the budget."""
    budget: ModelBudget | None = None


class ModelReservation(msgspec.Struct, frozen=True):
    """Reservation of the most that a call may cost, in the budgets, before the call is made."""

    key: Annotated[str, msgspec.Meta(max_length=500)]
    """Idempotency key of the call; a second reservation with it changes nothing."""
    node: Annotated[str, msgspec.Meta(max_length=300)]
    """Node and iteration, whose calls share the budget."""
    model_id: Annotated[str, msgspec.Meta(max_length=64)]
    tokens: TokenCount
    cost: Nanodollars | None
    """Nano-dollars; None if the price is unknown."""
    budget: ModelBudget | None
    """Budget of the node; None without one."""


class ModelSettlement(msgspec.Struct, frozen=True):
    """Usage and cost of a call that has been answered."""

    key: Annotated[str, msgspec.Meta(max_length=500)]
    node: Annotated[str, msgspec.Meta(max_length=300)]
    model_id: Annotated[str, msgspec.Meta(max_length=64)]
    usage: TokenUsage
    cost: Nanodollars | None
    duration_milliseconds: Milliseconds = 0
    """Time from the request to the complete answer."""


class FailedModelCall(msgspec.Struct, frozen=True):
    """Call that its provider has not answered, for the metrics of the model."""

    model_id: Annotated[str, msgspec.Meta(max_length=64)]
    error: Annotated[str, msgspec.Meta(pattern="^[a-z0-9-]{1,64}$")]
    """Code of the failure."""


class CalledModel(msgspec.Struct, frozen=True, rename="camel"):
    """Model at its provider, as it was asked for."""

    provider: ModelProvider
    name: str


class ModelCallRecord(msgspec.Struct, frozen=True, rename="camel", omit_defaults=True):
    """Record of one call in the journal: its cost, and the text with which a repetition of the node continues."""

    model_id: str
    model: str = ""
    """Model that the provider has named."""
    usage: TokenUsage | None = None
    """None if there is no answer."""
    cost: Nanodollars | None = None
    """Nano-dollars; None if the price is unknown."""
    finish_reason: FinishReason | None = None
    error: str = ""
    """Code of the failure of a call without an answer."""
    may_be_billed: bool = False
    """Whether the provider may bill a call without an answer."""
    wait_milliseconds: int | None = None
    """Time for which the node waits after this call, since its provider has asked for it; None without a wait."""
    text: str | None = None
    """Text of an answer that the model was asked to correct; None for others."""
    called: CalledModel | None = None
    """Model at its provider; None if no request was made."""
    began_at: datetime | None = None
    """Time of the request, by the clock of the run; None without one."""
    ended_at: datetime | None = None
    """Time of the answer or failure."""

    @property
    def identity(self) -> tuple[str, str, str]:
        """Model and times, which no two calls of a run share."""
        return self.model_id, str(self.began_at), str(self.ended_at)


def count_unanswered(records: Sequence[ModelCallRecord]) -> int:
    """Return the number of calls without an answer that their providers may bill nevertheless."""
    return sum(record.may_be_billed for record in records)


def sum_usage(records: Sequence[ModelCallRecord]) -> TokenUsage:
    """Return the tokens of all answered calls together; estimated if those of any call are."""
    used = [record.usage for record in records if record.usage is not None]
    return TokenUsage(
        sum(each.input_tokens for each in used),
        sum(each.output_tokens for each in used),
        sum(each.cache_read_tokens for each in used),
        sum(each.cache_write_tokens for each in used),
        sum(each.reasoning_tokens for each in used),
        is_estimated=any(each.is_estimated for each in used),
    )


def sum_cost(records: Sequence[ModelCallRecord]) -> int | None:
    """Return the cost of all answers in nano-dollars, 0 without any; None if the cost of one is unknown."""
    costs = [record.cost for record in records if record.usage is not None]
    known = [cost for cost in costs if cost is not None]
    return sum(known) if len(known) == len(costs) else None


class ModelReply(msgspec.Struct, frozen=True):
    """Answer of a model with its cost."""

    answer: ChatAnswer
    cost: int | None
    """Nano-dollars; None if the price is unknown."""
    called: CalledModel | None = None


class ModelCallFailed(NodeError):
    """Call without an answer of the model; nothing of a partial answer is kept."""

    def __init__(
        self,
        message: str,
        *,
        code: str,
        retryable: bool,
        can_fall_back: bool,
        retry_after_seconds: float | None = None,
        may_be_billed: bool = False,
        book_return: Callable[[], float] | None = None,
    ) -> None:
        super().__init__(message, code=code, retryable=retryable, retry_after_seconds=retry_after_seconds)
        self.can_fall_back = can_fall_back
        """Whether another model may be asked: not for requests that any model would refuse."""
        self.may_be_billed = may_be_billed
        """Whether the provider may have begun to answer."""
        self.called: CalledModel | None = None
        """Model that was asked; None if no request was made."""
        self.book_return = book_return
        """Function that reserves a time for a later attempt, which no other caller gets, and returns the seconds until
        then; None if attempts have no order. Not called if another model answers."""

    def with_message(self, message: str) -> Self:
        """Return a copy of this failure with another message."""
        copied = type(self)(
            message,
            code=self.code,
            retryable=self.retryable,
            can_fall_back=self.can_fall_back,
            retry_after_seconds=self.retry_after_seconds,
            may_be_billed=self.may_be_billed,
            book_return=self.book_return,
        )
        copied.called = self.called
        return copied


def estimate_tokens(text: str) -> int:
    """Return an upper estimate of the tokens of a text: one for three bytes of UTF-8, rounded up."""
    return -(-len(text.encode(errors="surrogatepass")) // 3)


def measure_calls(message: ChatMessage) -> int:
    """Return the bytes of a message beside its text, as JSON: the larger of its tool calls and provider
    content, or 0.
    """
    parts = [part for part in (message.tool_calls, message.provider_content) if part]
    return max((len(msgspec.json.encode(part)) for part in parts), default=0)


def estimate_input_tokens(request: ChatRequest) -> int:
    """Return an upper estimate of the input tokens of a request: messages with their tool calls, tools and schemas."""
    sizes = sum(
        estimate_tokens(message.content) + -(-measure_calls(message) // 3) for message in request.messages
    )
    schemas = [request.output_schema, *(msgspec.to_builtins(tool) for tool in request.tools)]
    if request.tools and request.tool_mode is ToolMode.JSON:
        sizes += JSON_RULES_TOKENS
        schemas.append(request.final_schema)
    return sizes + sum(-(-len(msgspec.json.encode(schema)) // 3) for schema in schemas if schema)
