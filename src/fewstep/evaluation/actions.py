"""How far a policy's actions are from those of held-out episodes: what can be measured without a simulator.

FOLDER/actions.json  a row for each method and number of calls, kept as figures.json is
"""

import json
from pathlib import Path
from typing import Any

import torch

from fewstep.data.base import Dataset
from fewstep.data.demonstrations.chunks import ChunkSet
from fewstep.data.demonstrations.normaliser import PolicySpec
from fewstep.data.draws import even_draw
from fewstep.evaluation.evaluate import method_of, newest
from fewstep.policies.policy import Policy
from fewstep.recipes.config import EvaluationConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training.run_folder import RunFolder
from fewstep.utils.errors import DataError, TrainingDivergedError
from fewstep.utils.files import read_rows, readable, reading, updating, write_atomically
from fewstep.utils.text import aligned, quoted

Row = dict[str, Any]
ACTIONS_FILE = "actions.json"
_NUMBER = int | float
_IDENTITY = {"method": str, "steps": int, "samples": int, "seed": int}
_KINDS = _IDENTITY | {"error": _NUMBER, "errors": list}
_SHOWN = 8  # actions whose errors stand in the table one by one
_TRACED = 200  # steps of an episode that are kept to be drawn
_LARGEST = 10.0  # of an error, in units of the actions' spread, that no trained policy makes


def measure_actions(run: RunFolder, dataset: Dataset, settings: EvaluationConfig, weights: str = "") -> list[Row]:
    """A row of `action_errors` for every step count, at `samples` steps of the held-out episodes."""
    pipeline, state = newest(run, weights)
    assert dataset.policy is not None
    name = method_of(run) + (f", {weights}" if weights not in ("", next(iter(run.averages()))) else "")
    rows: list[Row] = []
    for count in (1,) if dataset.policy.from_zero else settings.steps:
        error, errors = action_errors(pipeline, dataset, settings.samples, count, settings.seed)
        drawn = min(settings.samples, len(dataset.heldout))
        measured = {"samples": drawn, "seed": settings.seed, "error": error, "errors": errors.tolist()}
        measured |= {} if rows else {"trace": episode_trace(pipeline, dataset, count, settings.seed)}
        rows.append({"method": name, "steps": count} | measured | state)
    return rows


def check_actions(run: RunFolder, rows: list[Row]) -> None:
    """Raise TrainingDivergedError for errors that no trained policy makes."""
    for row in rows:
        if not row["error"] <= _LARGEST:
            raise TrainingDivergedError(
                f"{run.root}: actions are {row['error']:.3g} times their spread away from those of held-out episodes "
                f"in {row['steps']} steps: the training has diverged, or learned nothing yet; lower the learning rate "
                "and train anew with another --out, or train this run longer"
            )


def actions_table(rows: list[Row]) -> str:
    """Rows as aligned text, and what they are."""
    cells = [("method", "calls", "error", "of each action, in its own units")]
    cells += [(row["method"], str(row["steps"]), f"{row['error']:.3f}", each_error(row)) for row in rows]
    return (
        f"{aligned(cells)}\nRoot mean square at {rows[0]['samples']} steps of the held-out episodes, of the actions "
        "taken there; error: in units\nof each action's standard deviation, 1 for the mean action. Whether it reaches "
        "its goal a simulator shows:\nfewstep rollout RUN --task FILE.py:NAME, or TASK for one of fewstep's."
    )


def each_error(row: Row) -> str:
    """The errors of the first eight actions, each in its own units."""
    shown = " ".join(f"{value:.3g}" for value in row["errors"][:_SHOWN])
    return shown + (" ..." if len(row["errors"]) > _SHOWN else "")


def write_actions(rows: list[Row], folder: Path) -> Path:
    """Store rows in actions.json beside those stored earlier; a row measured anew replaces its older self."""
    fresh, file = {tuple(row[key] for key in _IDENTITY) for row in rows}, folder / ACTIONS_FILE
    with updating(folder):
        kept = [row for row in read_actions(folder) if tuple(row[key] for key in _IDENTITY) not in fresh]
        write_atomically(file, json.dumps([*kept, *readable(rows)], indent=2) + "\n")
    return file


def read_actions(folder: Path) -> list[Row]:
    """Rows stored earlier, or none; raises CheckpointError when the file is damaged."""
    advice = f"delete it, and run fewstep evaluate {quoted(folder)} anew"
    rows = read_rows(folder / ACTIONS_FILE, _KINDS, advice)
    with reading(folder / ACTIONS_FILE, advice):
        for row in rows:
            if not all(isinstance(value, _NUMBER) for value in row["errors"]):
                raise ValueError(f"errors of {row['method']!r} are none")
            for lines in row.get("trace", {}).values():
                if not all(isinstance(value, _NUMBER) for line in lines for value in line):
                    raise ValueError(f"trace of {row['method']!r} is none")
    return rows


@torch.no_grad()
def episode_trace(pipeline: Pipeline, dataset: Dataset, steps: int, seed: int) -> dict[str, list[list[float]]]:
    """The first actions of the first held-out episode, and what the policy answers when it sees what was seen there.

    {"done": (T, Da'), "answered": (T, Da')}, T at most 200 and Da' at most 8, each chunk of n_action_steps asked for at
    its first step.
    """
    heldout, spec = dataset.heldout, dataset.policy
    assert isinstance(heldout, ChunkSet)
    assert spec is not None
    length = min(heldout.length_of_first, _TRACED)
    looked = torch.arange(0, length, spec.chunks.n_action_steps)
    observed = heldout.context(looked).observation
    assert observed is not None
    answered = Policy(pipeline, steps, seed).predict_chunk(spec.observations.decode(observed)).flatten(0, 1)
    done = spec.actions.decode(heldout.fetch(torch.arange(length))[0][:, 0])
    return {"done": done[:, :_SHOWN].tolist(), "answered": answered[:length, :_SHOWN].tolist()}


@torch.no_grad()
def action_errors(
    pipeline: Pipeline, dataset: Dataset, samples: int, steps: int, seed: int
) -> tuple[float, torch.Tensor]:
    """(error in units of the actions' spread, root mean square error of each action in its own units (Da,)).

    Of what the policy answers at steps of held-out episodes, drawn over all of them, against what was done there: the
    n_action_steps actions that are taken, as far as their episode has them. The spread of an action is its standard
    deviation in the training episodes; actions without any count in units of 1. Raises DataError where samples are no
    actions.
    """
    spec: PolicySpec | None = dataset.policy
    if spec is None:
        raise DataError(f"{dataset.name} are no actions: measure samples with fewstep evaluate")
    indices = even_draw(dataset.heldout, samples, seed)
    context, chunks = dataset.heldout.context(indices), dataset.heldout.fetch(indices)[0]
    assert context.observation is not None
    assert context.loss_mask is not None
    taken = slice(spec.chunks.n_action_steps)
    answered = Policy(pipeline, steps, seed).predict_chunk(spec.observations.decode(context.observation)).double()
    done, counted = spec.actions.decode(chunks[:, taken].double()), context.loss_mask[:, taken].any(-1)
    error = (answered - done)[counted].square().mean(0)
    trained = dataset.train.fetch(even_draw(dataset.train, samples, seed))[0][:, 0]
    variance = spec.actions.decode(trained.double()).var(0, correction=0)
    relative = error / torch.where(spec.actions.varied, variance, 1.0)
    return float(relative[spec.actions.varied].mean().sqrt()), error.sqrt()
