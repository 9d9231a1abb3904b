"""Pages from the templates beside this file: they load nothing from elsewhere, and every text in them is escaped."""

from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from urllib.parse import urlsplit

from jinja2 import Environment, PackageLoader, StrictUndefined

from fewstep._version import __version__
from fewstep.utils.text import printable

Pairs = tuple[tuple[str, str], ...]

_SAFE_SCHEMES = frozenset({"http", "https", "mailto"})


@dataclass(frozen=True)
class Plot:
    """A figure as addresses of its own bytes, for wide and narrow screens, light and dark."""

    alt: str
    wide: str
    wide_dark: str
    narrow: str
    narrow_dark: str


def plot(draw: Callable[[int, bool], bytes], columns: int, alt: str) -> Plot:
    """The four versions of what `draw(columns, dark)` gives as PNG."""
    return Plot(alt, *(embed(draw(across, dark)) for across in (columns, 1) for dark in (False, True)))


def page(template: str, **values: object) -> str:
    """The page that a template makes of these values."""
    return _environment().get_template(template).render(values)


def is_harmless(address: str) -> bool:
    """Whether an address leads to a page, and runs nothing: on the web, or below a folder beside this one."""
    parts = urlsplit(address)
    local = not (parts.scheme or parts.netloc or address.startswith(("/", "\\")))
    return address == printable(address).strip() and (local or bool(parts.scheme.lower() in _SAFE_SCHEMES))


def embed(picture: bytes, kind: str = "png") -> str:
    """A picture as the address of its own bytes."""
    return f"data:image/{kind};base64,{b64encode(picture).decode('ascii')}"


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("fewstep.evaluation.report"),
        autoescape=True,
        finalize=lambda value: printable(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals["version"] = __version__
    made.tests["harmless"] = is_harmless
    return made
