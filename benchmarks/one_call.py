"""Variants of the recipe `digits` that its options cannot name: other times, another objective, another path.

    python benchmarks/one_call.py runs/some --times logit-normal --path trig --to-end 0.75 --seed 5
    fewstep evaluate runs/some --steps 1 2 4 --seed 5005

trains one of them for 400,000 images (LOG.md, 2026-11-22).
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from fewstep.config import ModelConfig, RunConfig
from fewstep.data import load_dataset
from fewstep.guidance import FixedGuidance
from fewstep.objectives import ISD, MeanFlow
from fewstep.recipes import recipe
from fewstep.times import BetaTimes, LogitNormalTimes
from fewstep.training import Machine, RunFolder, train

TIMES = {"beta": BetaTimes(), "logit-normal": LogitNormalTimes()}
MODELS = {
    "linear": ModelConfig(path="linear", preconditioning="linear", scaling="identity"),
    "trig": ModelConfig(path="trig", preconditioning="linear", scaling="unit"),
}


def variant(options: argparse.Namespace) -> RunConfig:
    """The recipe with what the options change."""
    base = recipe("digits")
    shared = {"to_end": options.to_end, "diagonal": options.diagonal, "times": TIMES[options.times]}
    objective: ISD | MeanFlow
    if options.meanflow:
        objective = MeanFlow(guidance=FixedGuidance(omega=1.3), derivative="finite-difference", **shared)
    else:
        assert isinstance(base.objective, ISD)
        objective = replace(base.objective, **shared)
    training = replace(base.training, images=options.images, seed=options.seed)
    return replace(base, model=MODELS[options.path], objective=objective, training=training)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="run folder")
    parser.add_argument("--times", choices=sorted(TIMES), default="logit-normal")
    parser.add_argument("--path", choices=sorted(MODELS), default="linear")
    parser.add_argument("--meanflow", action="store_true", help="MeanFlow with guidance 1.3 in place of iSD-T")
    parser.add_argument("--to-end", type=float, default=0.75)
    parser.add_argument("--diagonal", type=float, default=0.75)
    parser.add_argument("--images", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    config = variant(options)
    train(config, load_dataset(config.data), RunFolder(options.out), Machine(cpu=True))


if __name__ == "__main__":
    main()
