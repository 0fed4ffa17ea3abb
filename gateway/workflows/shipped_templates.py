"""Templates that ship with the server for all organizations: exported documents in YAML.

A file `name.yaml` in the folder `templates` is the template `wf_tmpl_name`. Its nodes name data sources by
placeholders: the user of the template replaces each by a data source of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from gateway.workflows import workflow_documents
from gateway.workflows.workflow_documents import FORMAT, FORMAT_VERSION, ImportedDocument, ImportWorkflow

if TYPE_CHECKING:
    from gateway.workflows.stored_workflow import StoredWorkflow
    from models.access import ApiCaller
    from nodes.catalog import NodeCatalog

FOLDER: Final = Path(__file__).parent / "templates"
PREFIX: Final = "wf_tmpl_"
SINCE: Final = datetime(2026, 11, 25, tzinfo=UTC)
"""Creation time of the templates: the date of the first release."""


class ShippedTemplate(Struct, frozen=True):
    """Template that ships with the server."""

    id: str
    document: ImportedDocument

    def build_draft(self, caller: ApiCaller, catalog: NodeCatalog, now: datetime) -> StoredWorkflow:
        """Return a new draft of the caller (a workflow that is not active) by the template, without storing it.

        `catalog` validates its nodes. The placeholders of the template's data sources remain in the nodes.
        """
        return workflow_documents.import_document(
            caller, ImportWorkflow(document=self.document), catalog, now
        )

    def build_list_item(self, caller: ApiCaller, catalog: NodeCatalog) -> StoredWorkflow:
        """Return the template as a workflow for a list of templates, with the template's own id."""
        return self.build_draft(caller, catalog, SINCE).with_columns(id=self.id)


@cache
def load_templates() -> Mapping[str, ShippedTemplate]:
    """Return all templates that ship with the server by id, in the order of their names; read once per process."""
    return {one.id: one for one in map(_read, sorted(FOLDER.glob("*.yaml")))}


def _read(path: Path) -> ShippedTemplate:
    """Return a template from its YAML file; its id is made of the file's name."""
    import yaml  # noqa: PLC0415 - most gateways are never asked for a template

    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    described = {"format": FORMAT, "formatVersion": FORMAT_VERSION, **content}
    return ShippedTemplate(f"{PREFIX}{path.stem}", msgspec.convert(described, ImportedDocument))
