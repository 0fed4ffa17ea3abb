"""Generated files of this folder by their names."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from deploy.monitoring import alert_rules, boards

FOLDER: Final = Path(__file__).parent
RULES: Final = FOLDER / "rules.yaml"


def build_files() -> dict[Path, str]:
    """Return the texts of the alert rules and of each board, by the paths of their files."""
    return {
        RULES: alert_rules.build_rules(),
        **{FOLDER / f"{board.uid}.json": boards.build_board(board) for board in boards.list_boards()},
    }
