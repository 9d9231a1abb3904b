"""`fewstep advise DATA`: which recipe, and what to expect."""

from dataclasses import dataclass
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Options:
    """Say which recipe to take for some data: objective, network, the command, the figure and time to expect.

    Figures are those of the studies, on the data that they were measured on; nothing is trained.
    """

    data: Annotated[str, tyro.conf.Positional]
    """digits, fashion-mnist, a folder of images or latents, tars, parquet or a cached OWNER/NAME, an .npz archive, or a
    file of demonstrations."""
    teacher: str = ""
    """A model to distil: a run, a folder of diffusers, a pickle of EDM, OWNER/NAME of the Hub, FILE.py:NAME."""
    seconds: float = 0.0
    """Training time that there is; 0 for as long as the recipe takes."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    from fewstep.evaluation.advice.advise import advise

    print(advise(options.data, options.teacher, options.seconds))
