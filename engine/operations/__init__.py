"""Table of the operations for `{"$op": name, "args": [...]}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from engine.operations import arithmetic, containers, conversions, dates, texts
from engine.operations.operation import ExpressionOperation, OperationError

__all__ = ["OPERATIONS", "ExpressionOperation", "OperationError"]

OPERATIONS: Final[Mapping[str, ExpressionOperation]] = {
    entry.name: entry
    for module in (arithmetic, texts, containers, dates, conversions)
    for entry in vars(module).values()
    if isinstance(entry, ExpressionOperation)
}
