"""`fewstep rollout RUN`: a policy acts in its task."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fewstep.data.demonstrations.normaliser import FIRST_TEST_SEED
from fewstep.utils.errors import ConfigError


@dataclass(frozen=True)
class Options:
    """Let a policy act in its task: success with its Wilson interval, mean length, time per decision.

    Simulations go in lockstep, one batched network call a chunk. No demonstration had the usual starts, from 100000 on.
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of a run or of a saved model."""
    episodes: int = 50
    """Number of episodes to act in."""
    steps: tuple[int, ...] = ()
    """Network calls a decision; several are measured in turn. Not given: the recipe's."""
    task: str = ""
    """Task to act in: a name, or FILE.py:NAME, a fewstep.Task of your own; that of the demonstrations else."""
    seed: int = 0
    """Of the policy's noise."""
    first_seed: int = FIRST_TEST_SEED
    """Start of the first episode; the others follow. Those below 100000 are what demonstrations start from."""
    expert: bool = False
    """Also measure the task's expert at the same starts."""
    film: bool = False
    """Also draw the first episode, with the first step count: film.gif and filmstrip.png beside the figures."""
    out: Path | None = None
    """Folder for rollouts.json and the film, which `fewstep report` with the same --out shows; RUN when not given."""
    at_once: int = 25
    """Simulations held at the same time."""
    threads: int = 1
    """CPU threads of the network; one is the fastest for a policy's small one."""
    quiet: bool = False
    """No progress line."""


def run(options: Options) -> None:
    """Run the command; raises what it calls raises."""
    import torch

    from fewstep.evaluation.rollouts import choose_drawing, draw_film, expert_row, measure_rollouts, show_on_terminal
    from fewstep.policies.figures import rollout_table, write_rollouts

    if options.threads < 1:
        raise ConfigError(f"{options.threads} threads asked for: give at least 1")
    torch.set_num_threads(options.threads)
    if options.film:
        choose_drawing()
    starts = options.episodes, options.seed, options.first_seed, options.at_once
    progress = None if options.quiet or not sys.stderr.isatty() else show_on_terminal
    rows, task, policy = measure_rollouts(options.run, options.steps, options.task, *starts, progress)
    if options.expert:
        rows.append(expert_row(task, options.episodes, options.first_seed))
    print(f"\n{rollout_table(rows)}" if progress else rollout_table(rows))
    folder = options.out or options.run
    print(f"Stored: {write_rollouts(rows, folder)}")
    if options.film:
        print(f"Film: {draw_film(policy, task, options.first_seed, folder)}")
