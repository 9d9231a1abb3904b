"""What every page is made of: a frame that loads nothing from elsewhere, its head, figures that follow the screen."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from html import escape
from importlib import resources
from urllib.parse import urlsplit

from fewstep._version import __version__

Pairs = tuple[tuple[str, str], ...]

_PHONE = "(max-width: 620px)"
_NIGHT = "(prefers-color-scheme: dark)"
_SAFE_SCHEMES = frozenset({"", "http", "https", "mailto"})


def document(title: str, body: str, style: str = "") -> str:
    """A page of that title: `body` is HTML already; `style` is added to page.css."""
    common = resources.files("fewstep.evaluation.report").joinpath("page.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{common}{style}</style>
</head>
<body>
<main>
{body}
<footer class="note">Written by fewstep {__version__}. This page stands alone: it loads nothing from elsewhere.</footer>
</main>
</body>
</html>
"""


def header(title: str, summary: str, facts: Pairs = (), links: Pairs = ()) -> str:
    """The head of a page: summary is plain text, paragraphs apart by an empty line; links are (text, address)."""
    paragraphs = "".join(f"<p>{escape(part.strip())}</p>\n" for part in summary.split("\n\n") if part.strip())
    shown_links = "\n".join(link(text, address) for text, address in links)
    shown_facts = "\n".join(
        f'<div class="card"><dt>{escape(label)}</dt><dd>{escape(value)}</dd></div>' for label, value in facts
    )
    return (
        f"<header>\n<h1>{escape(title)}</h1>\n{paragraphs}"
        + (f"<nav>\n{shown_links}\n</nav>\n" if links else "")
        + (f'<dl class="facts">\n{shown_facts}\n</dl>\n' if facts else "")
        + "</header>"
    )


def link(text: str, address: str) -> str:
    """A link, or the bare text when the address would run something."""
    if urlsplit(address.strip()).scheme.lower() not in _SAFE_SCHEMES:
        return f"<span>{escape(text)}</span>"
    return f'<a href="{escape(address.strip())}">{escape(text)}</a>'


def plot(draw: Callable[[int, bool], bytes], columns: int, alt: str, caption: str) -> str:
    """A figure in four versions, for wide and narrow screens, light and dark; `caption` is HTML already."""
    sources = (
        f'<source media="{_PHONE} and {_NIGHT}" srcset="{embed(draw(1, True))}">\n'
        f'<source media="{_PHONE}" srcset="{embed(draw(1, False))}">\n'
        f'<source media="{_NIGHT}" srcset="{embed(draw(columns, True))}">\n'
    )
    image = f'<img src="{embed(draw(columns, False))}" alt="{escape(alt)}">'
    return (
        f'<figure class="plot card">\n<picture>\n{sources}{image}\n</picture>\n'
        f'<figcaption class="note">{caption}</figcaption>\n</figure>\n'
    )


def embed(png: bytes) -> str:
    """A picture as the address of its own bytes."""
    return f"data:image/png;base64,{b64encode(png).decode('ascii')}"
