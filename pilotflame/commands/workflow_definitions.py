"""Files of workflows, in YAML or JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pilotflame.command_error import CommandError

SUFFIXES = frozenset({".json", ".yaml", ".yml"})


def read_definition(file: Path) -> dict[str, Any]:
    """Return the workflow of a file; raises `CommandError` unless it is an object with a name."""
    import yaml

    try:
        text = file.read_text(encoding="utf-8")
        definition = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
        json.dumps(definition, allow_nan=False)
    except (ValueError, TypeError, RecursionError, yaml.YAMLError) as error:
        raise CommandError(
            f"{file} is not valid {file.suffix.lstrip('.') or 'YAML'}: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(definition, dict) or not isinstance(definition.get("name"), str):
        raise CommandError(f"{file} is not a workflow: it must be an object with a name")
    return definition
