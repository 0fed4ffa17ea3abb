"""Rendering of pages: Jinja2 templates that escape every value.

Jinja2 is loaded with the first page, so that gateways without visitors do not pay for it.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gateway.dashboard import formats

if TYPE_CHECKING:
    from collections.abc import Mapping

    import jinja2

FOLDER: Final = Path(__file__).parent / "templates"
_METHODS: Final = frozenset(dir(dict))


def render_template(name: str, values: Mapping[str, Any]) -> str:
    """Return the HTML of a template of the dashboard by its file name with `values`, which are escaped."""
    text: str = _open_environment().get_template(name).render(values)
    return text


@cache
def _open_environment() -> jinja2.Environment:
    """Return the environment of the dashboard's templates, which escapes all values; opened once."""
    import jinja2  # noqa: PLC0415 - see above

    class PageEnvironment(jinja2.Environment):
        """Environment that looks names up in answers of the API first, as keys.

        Jinja2 tries attributes first, and the failure of each takes longer than the rest of a small element.
        """

        def getattr(self, obj: Any, attribute: str) -> Any:  # noqa: ANN401 - any value of a template
            if type(obj) is not dict or attribute in _METHODS:
                return super().getattr(obj, attribute)
            return obj[attribute] if attribute in obj else self.undefined(obj=obj, name=attribute)

    environment = PageEnvironment(
        autoescape=True,
        loader=jinja2.FileSystemLoader(FOLDER),
        # Answers leave fields out that don't apply, such as the URL of an error that no request has caused.
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )
    environment.filters |= {
        "bytes": formats.show_bytes,
        "clock": formats.show_clock,
        "count": formats.show_count,
        "duration": formats.show_duration,
        "hours": formats.show_hours,
        "in_runs": formats.say_runs,
        "json": formats.show_json,
        "json_whole": formats.show_whole_json,
        "latency": formats.show_latency,
        "line": formats.show_line,
        "moment": formats.show_moment,
    }
    environment.globals |= {
        "age": formats.show_age,
        "show_day_time": formats.show_day_time,
        "arrival": formats.show_arrival,
        "icon_of_trigger": formats.icon_of_trigger,
        "icon_of_type": formats.icon_of_type,
        "look_of": formats.look_of,
    }
    return environment
