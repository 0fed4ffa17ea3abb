"""Views of spans: `packed_span` has those that are packed, `recorded_span` also those with a row of their own.

Migration 0051 creates them. Statements that read spans of completed runs use them; those about failures, waits, writes
and agents, whose spans are never packed, read the table `span`. A statement names the runs by their ids, not by a join:
only such a condition reaches the tables of a view on SQLite, which reads the whole view otherwise.
"""

from __future__ import annotations

from typing import Final

from sqlalchemy import Column, MetaData, Table
from sqlalchemy.orm import aliased
from sqlmodel import SQLModel

from models.execution import SpanRow


def _view(name: str) -> Table:
    """Return a view with the columns of spans, apart from the tables that migrations create."""
    columns = SQLModel.metadata.tables["span"].columns
    return Table(name, MetaData(), *(Column(column.name, column.type) for column in columns))


RECORDED_SPAN_VIEW: Final = _view("recorded_span")
RecordedSpan: Final = aliased(SpanRow, RECORDED_SPAN_VIEW, adapt_on_names=True)
"""Span of either form."""
OtherRecordedSpan: Final = aliased(SpanRow, RECORDED_SPAN_VIEW.alias("other_span"), adapt_on_names=True)
"""Another span of either form in the same statement."""
PackedSpan: Final = aliased(SpanRow, _view("packed_span"), adapt_on_names=True)
"""Packed span."""
