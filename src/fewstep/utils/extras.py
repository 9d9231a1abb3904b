"""How optional packages are installed, in words for messages."""

import re
from importlib.metadata import PackageNotFoundError, requires


def installing(extra: str) -> str:
    """The command that installs the packages of an extra, by their own names: fewstep itself may lie in a folder."""
    try:
        lines = requires("fewstep") or []
    except PackageNotFoundError:  # run from its source
        lines = []
    wanted = [line for line in lines if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", line)]
    names = [re.split(r"[\s<>=!~;(]", line, maxsplit=1)[0] for line in wanted]
    return f"pip install {' '.join(names) or f'fewstep[{extra}]'} (the extra [{extra}])"
