"""Exit codes of commands."""

from typing import Final

REFUSED: Final = 1
"""The server refused the request, or did not answer."""
USAGE: Final = 2
"""Wrong options, settings or files."""
LOGIN: Final = 4
"""No valid key, or a key without the scope."""
RUN_FAILED: Final = 5
TIMED_OUT: Final = 6
DIFFERENT: Final = 7
"""`diff --exit-code` or `pull --check` has found differences, or `apply --dry-run` conflicts."""
INTERRUPTED: Final = 130
