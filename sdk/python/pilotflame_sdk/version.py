"""Version of the SDK, which is that of the server it was made for."""

from typing import Final

VERSION: Final = "0.2.0"
