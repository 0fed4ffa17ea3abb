"""Table of the steps of agents."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import BigInteger, Column, SmallInteger, Text
from sqlmodel import Field, SQLModel

from models.column_types import TimestampColumn


class AgentStepRow(SQLModel, table=True):
    """Answer of a model, or tool call, of an agent."""

    __tablename__ = "execution_step"

    execution_id: str = Field(primary_key=True)
    node_id: str = Field(primary_key=True)
    iteration: str = Field(primary_key=True, default="")
    number: int = Field(primary_key=True)
    shard: int = Field(sa_column=Column(SmallInteger, nullable=False))
    id: str
    sequence: int
    kind: str
    name: str
    status: str
    attempt: int = 1
    losses: int = 0
    effect: str | None = None
    call_id: str
    key: str
    request_hash: str
    arguments: str | None = Field(default=None, sa_column=Column(Text))
    result: str | None = Field(default=None, sa_column=Column(Text))
    model_calls: str | None = Field(default=None, sa_column=Column(Text))
    """JSON list of the calls of language models in the step."""
    cost: int | None = Field(default=None, sa_column=Column(BigInteger))
    """Known cost of the step in nano-dollars; None without calls, and if the cost of one is unknown."""
    reuse: str | None = None
    """Use of a step of a replayed run, as `engine.agents.agent_steps.StepReuse`; None for a step of this run."""
    started_at: datetime = Field(sa_column=Column(TimestampColumn, nullable=False))
    ended_at: datetime | None = Field(default=None, sa_column=Column(TimestampColumn))
    conversation: int | None = None
    """Number of its conversation, from 0, if its contents are not recorded; None if they are."""
