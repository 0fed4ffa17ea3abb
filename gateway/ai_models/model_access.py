"""Access of users to the language models that a workflow names, checked before a run of it is accepted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from sqlalchemy import select
from sqlmodel import col

from gateway.http import errors, limits
from gateway.http.errors import ApiError
from models.ai_model import AiModel, is_usable_by
from nodes.ai.model_connection import ECHO_MODEL_ID

if TYPE_CHECKING:
    from models.database import Database

SHOWN_IDS: Final = 3
"""Models that the message of a refusal names."""


async def require_usable(
    database: Database, models: Mapping[str, str], *, organization_id: str, user_id: str
) -> None:
    """Raise a 403 error that names the language models that the user of a run may not use, if there are any.

    `models` maps the id of each model to the id of a node that names it; everybody may use `echo`. Models that don't
    exist are refused in the same way, so that guessing an id reveals nothing. The error has at most 100 details.
    """
    asked = models.keys() - {ECHO_MODEL_ID}
    if not asked:
        return
    statement = select(col(AiModel.id)).where(is_usable_by(organization_id, user_id))
    if len(asked) <= limits.MODELS:
        # A graph may name more ids than a statement has parameters, but an organization has no more models.
        statement = statement.where(col(AiModel.id).in_(sorted(asked)))
    async with database.read() as connection:
        usable = set(await connection.scalars(statement))
    refused = [model_id for model_id in models if model_id in asked and model_id not in usable]
    if not refused:
        return
    named = ", ".join(refused[:SHOWN_IDS])
    others = len(refused) - SHOWN_IDS
    more = f" and {others:,} more" if others > 0 else ""
    message = (
        f"The run may not use the language model {named}{more}:"
        " its owner has to share it with the user of the run"
    )
    details = [
        errors.problem(
            f"nodes.{models[model_id]}", "model-not-usable", f"There is no model {model_id!r} to use"
        )
        for model_id in refused[: limits.FINDINGS]
    ]
    raise ApiError(403, "model-not-usable", message, details=details)
