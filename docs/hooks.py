"""Hooks of the site's build (mkdocs.yml): pages made from the package, pages of the root, an offline check."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs"))

from reference import UndocumentedError, pages, rooms_there  # noqa: E402  # found beside this file

FROM_ROOT = {"changelog.md": "CHANGELOG.md", "log.md": "LOG.md", "contributing.md": "CONTRIBUTING.md"}
_ELSEWHERE = re.compile(
    r"<(?:script|img|source|iframe)[^>]+src=[\"']?(https?:)?//|<link[^>]+rel=[\"']?stylesheet[^>]+//"
)


def _of_root(text: str) -> str:
    """A page of the repository's root as one of docs/."""
    return text.replace("](docs/", "](").replace("](LOG.md", "](log.md").replace("](CHANGELOG.md", "](changelog.md")


def on_config(config: Any) -> Any:
    """Navigation ends with the pages that on_files adds: one of each room, and those of the root."""
    rooms = [f"reference/api/{room}.md" for room in rooms_there()]
    reference = ["reference/commands.md", "reference/recipes.md", "reference/objectives.md"]
    config.nav += [
        {"Reference": [*reference, {"Python": ["reference/api/index.md", *rooms]}]},
        {"Project": list(FROM_ROOT)},
    ]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages; an undocumented option or name ends the build."""
    try:
        made = pages()
    except UndocumentedError as error:
        raise PluginError(str(error)) from error
    made |= {page: _of_root((ROOT / name).read_text()) for page, name in FROM_ROOT.items()}
    for path, content in made.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_post_build(config: Any) -> None:
    """The site must work without a network: no script, style or picture from elsewhere."""
    for page in Path(config.site_dir).rglob("*.html"):
        if match := _ELSEWHERE.search(page.read_text()):
            raise PluginError(f"{page}: loads something from elsewhere: {match[0][:120]}")
