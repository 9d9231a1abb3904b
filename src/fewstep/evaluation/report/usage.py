"""How to take a run's model into use: three lines of Python, and the command that does the same."""

from collections.abc import Sequence
from pathlib import Path

from fewstep.utils.text import from_here, quoted


def usage(root: Path, steps: int, acts: bool, files: Sequence[Path] = (), observed: int = 0) -> tuple[str, str]:
    """(Python, command) for the run in a folder at so many steps; files: of the user's own parts, imported first.

    acts: whether it is a policy, whose observations have `observed` numbers.
    """
    places = [from_here(file.resolve()) for file in files]
    imports = [f"fewstep.import_file({str(place)!r})" for place in places]
    root = from_here(root.resolve())
    also = "".join(f" --import {quoted(place)}" for place in places)
    if acts:
        lines = [
            f"policy = fewstep.load_policy({str(root)!r}, steps={steps})",
            f"action = policy.select_action([0.0] * {observed})  # an observation; reset() begins an episode",
        ]
        command = f"fewstep rollout {quoted(root)} --steps {steps} --task FILE.py:NAME"
    else:
        lines = [
            f"model = fewstep.load({str(root)!r})",
            f"images = model.generate(16, steps={steps}).samples",
        ]
        command = f"fewstep sample {quoted(root)} --steps {steps} --count 16 --out samples.png"
    return "\n".join(["import fewstep", *imports, *lines]), command + also
