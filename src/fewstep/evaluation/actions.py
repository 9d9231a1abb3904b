"""How far a policy's actions are from those of held-out episodes: what can be measured without a simulator."""

import torch

from fewstep.data.base import Dataset
from fewstep.data.demonstrations.normaliser import PolicySpec
from fewstep.data.draws import even_draw
from fewstep.evaluation.evaluate import method_of, newest
from fewstep.policies.policy import Policy
from fewstep.recipes.config import EvaluationConfig
from fewstep.sampling.pipeline import Pipeline
from fewstep.training.run_folder import RunFolder
from fewstep.utils.errors import DataError, TrainingDivergedError
from fewstep.utils.text import aligned

_SHOWN = 8  # actions whose errors stand in the table one by one
_LARGEST = 10.0  # of an error, in units of the actions' spread, that no trained policy makes


def measure_actions(run: RunFolder, dataset: Dataset, settings: EvaluationConfig, weights: str = "") -> str:
    """A table of `action_errors` for every step count, at `samples` steps of the held-out episodes.

    Raises TrainingDivergedError for errors that no trained policy makes.
    """
    pipeline, _ = newest(run, weights)
    assert dataset.policy is not None
    steps = (1,) if dataset.policy.from_zero else settings.steps
    cells, spread = [("method", "calls", "error", "of each action, in its own units")], 0.0
    for count in steps:
        spread, errors = action_errors(pipeline, dataset, settings.samples, count, settings.seed)
        each = " ".join(f"{value:.3g}" for value in errors.tolist()[:_SHOWN]) + (" ..." if len(errors) > _SHOWN else "")
        cells.append((method_of(run), str(count), f"{spread:.3f}", each))
        if not spread <= _LARGEST:
            raise TrainingDivergedError(
                f"{run.root}: actions are {spread:.3g} times their spread away from those of held-out episodes in "
                f"{count} steps: the training has diverged; lower the learning rate, and train anew with another --out"
            )
    drawn = min(settings.samples, len(dataset.heldout))
    return (
        f"{aligned(cells)}\nRoot mean square at {drawn} steps of the held-out episodes, of the actions taken there; "
        "error: in units\nof each action's standard deviation, 1 for the mean action. Success is another matter: see "
        "fewstep rollout."
    )


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
