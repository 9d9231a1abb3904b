"""How fast a network fits what each form of a jump leaves to it, X - L x - g D, by plain regression.

The student's own network, from the teacher's weights, on stored trajectories of the teacher: jumps between any two of
their levels, w(s) |X(x_t, t, s) - x_s|^2 with w = sd^2/(sd^2 + s^2). No slow average, no solver, no diagonal loss:
what is seen is the form alone. Errors are of held-out trajectories, over the spread of x_s.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fewstep as fs
from benchmarks.harness import RESULTS, Row, chosen, markdown, put, read, rounded, show, trainer_of
from benchmarks.skip.methods import FAMILIES, JUMP_END, base_methods
from fewstep.flow.flow_map import at
from fewstep.flow.preconditioning.estimation import noise_grid
from fewstep.flow.preconditioning.regression import RegressionSettings
from fewstep.flow.preconditioning.skip import SkipPreconditioningConfig
from fewstep.training.trajectories import trajectories
from fewstep.utils.random import Draws

FILE = RESULTS / "skip_learnability.json"
MOMENTS = (0, 25, 50, 100, 200, 400)
LEVELS, TRAIN, HELDOUT = 24, 2048, 512
JUMPS = ((80.0, 0.002), (80.0, 1.9), (12.9, 0.59), (1.9, 0.002))
SEED = 55_000
WARM_UP = 50


def forms(dataset: str) -> dict[str, fs.RunConfig]:
    """Every form of a jump, over Euler's: the family, in principal components or cosines, and whether it is seen."""
    known = base_methods(dataset)
    euler, analytic = known["euler"], known["analytic"]

    def skip(seen: bool, **settings: Any) -> fs.RunConfig:
        model = replace(euler.model, preconditioning=SkipPreconditioningConfig(**settings))
        return replace(euler, model=model, network=replace(euler.network, sees_skip=seen))  # type: ignore[call-arg]

    found = {"euler": euler, "analytic": analytic, "regressed, with g": skip(False, family="regressed", regress_g=True)}
    found |= {name: skip(False, **own) for name, own in FAMILIES.items()}
    found |= {f"{name}, seen": skip(True, **own) for name, own in FAMILIES.items()}
    cosines = {
        f"cosine {name}, seen": skip(True, basis="cosine", **own)
        for name, own in FAMILIES.items()
        if name != "regressed"
    }
    return found | cosines if isinstance(euler.network, fs.UNetConfig) else found


class Stored:
    """Trajectories (K, n, *shape) of the teacher at levels tau (K,), falling."""

    def __init__(self, teacher: fs.FlowMap, dataset: fs.Dataset, count: int) -> None:
        lam = noise_grid(teacher.path, LEVELS)
        settings = RegressionSettings("regressed", False, count, LEVELS, SEED)
        states, _, _ = zip(*trajectories(teacher, dataset, lam, settings), strict=True)
        self.tau, self.states = torch.exp(-lam), torch.cat(states, 1)

    def nearest(self, tau: float) -> int:
        """The level next to a noise level."""
        return int((self.tau.log() - torch.tensor(tau).log()).abs().argmin())

    def drawn(self, step: int, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(x_t, t, s, x_s) of a batch: any trajectory, any two levels."""
        draws = Draws(SEED, step, torch.arange(batch))
        row, a = draws.integers(0, self.states.shape[1]), draws.integers(1, LEVELS - 1)
        b = a + 1 + (draws.uniform(2) * (LEVELS - 1 - a)).long().clamp(max=LEVELS - 2 - a)
        return self.states[a, row], self.tau[a], self.tau[b], self.states[b, row]


@torch.no_grad()
def errors(model: fs.FlowMap, heldout: Stored) -> list[Row]:
    """Of each jump the error over the spread of where it ends, and of all jumps between every third level."""

    def error(a: int, b: int) -> float:
        x, end = heldout.states[a], heldout.states[b]
        landed = model.jump(x, at(float(heldout.tau[a]), x), at(float(heldout.tau[b]), x))
        return float((landed - end).square().mean() / (end - end.mean(0)).square().mean()) ** 0.5

    rows = []
    for t, s in JUMPS:
        rows.append({"jump": f"{t:g} -> {s:g}", "value": error(heldout.nearest(t), heldout.nearest(s))})
    rows.append({"jump": "gap", "value": gap(model, heldout)})
    pairs = [(a, b) for a in range(0, LEVELS, 3) for b in range(a + 3, LEVELS, 3)]
    mean = (sum(error(a, b) ** 2 for a, b in pairs) / len(pairs)) ** 0.5
    return [*rows, {"jump": "all", "value": mean}]


@torch.no_grad()
def gap(model: fs.FlowMap, heldout: Stored) -> float:
    """How far the network's output is from what the teacher's jumps need: root mean square of (X - jump)/g over jumps
    between every third level, each over the data's deviation. Before training it is the consistency gap.
    """
    found = []
    for a in range(0, LEVELS, 3):
        for b in range(a + 3, LEVELS, 3):
            x, end = heldout.states[a], heldout.states[b]
            t, s = at(float(heldout.tau[a]), x), at(float(heldout.tau[b]), x)
            g = model.preconditioning.coefficients(t, s)[1][:1]
            found.append(((model.jump(x, t, s) - end) / g).square().mean())
    return float(torch.stack(found).mean().sqrt()) / float(heldout.states[-1].std())


def fit(config: fs.RunConfig, teacher: Path, train: Stored, heldout: Stored, dataset: fs.Dataset) -> list[Row]:
    """Rows of one form: step, jump, value."""
    config, rows = replace(config, teacher=str(teacher)), []
    with trainer_of(config, dataset) as trainer:
        model, batch = trainer.learner.flow_map, config.training.batch_size
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.optimizer.lr, betas=(0.9, 0.99), weight_decay=0.0)
        variance = dataset.sigma_data**2
        for step in range(MOMENTS[-1] + 1):
            if step in MOMENTS:
                rows += [{"step": step, **row} for row in errors(model, heldout)]
            x, t, s, end = train.drawn(step, batch)
            weight = variance / (variance + s.square())
            loss = (weight * (model.jump(x, t, s) - end).square().flatten(1).mean(1)).mean()
            for group in optimizer.param_groups:
                group["lr"] = config.optimizer.lr * min(1.0, (step + 1) / WARM_UP)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return rows


def run(dataset: str, teacher: Path, data: fs.Dataset, names: tuple[str, ...], wanted: Callable[[str], bool]) -> None:
    """Fit the forms of these names, all where none is given, and keep a row of each."""
    known = forms(dataset)
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"no form {', '.join(unknown)}; forms: {', '.join(known)}")
    todo = [name for name in names or known if wanted(name)]
    loaded = fs.load(teacher).flow_map
    train, heldout = Stored(loaded, data, TRAIN), Stored(loaded, replace(data, train=data.heldout), HELDOUT)
    for name in todo:
        begin = time.perf_counter()
        curve = fit(known[name], teacher, train, heldout, data)
        row = {"dataset": dataset, "form": name, "seconds": time.perf_counter() - begin, "curve": curve}
        put(FILE, [rounded(row)], "dataset", "form")
        show([{"form": name, **chosen(curve, jump="all")[-1]}])


def known(datasets: tuple[str, ...]) -> dict[tuple[str, str], dict[str, float]]:
    """(data set, method) -> what is known of its form before training; larger is better. The form of a method that is
    compared where the jump ends is that of the published one.
    """
    found = {}
    for row in read(FILE):
        unet = row["dataset"] in ("fashion", "photographs")
        seen = row["form"].endswith(", seen")
        name = row["form"].removesuffix(", seen") if unet else row["form"]
        if row["dataset"] not in datasets or (unet and seen != (name in FAMILIES)):
            continue

        def value(jump: str, step: int, row: Row = row) -> float:
            return float(chosen(row["curve"], jump=jump, step=step)[0]["value"])

        measures = {
            "small consistency gap": -value("gap", 0),
            "small error at the start": -value("all", 0),
            "explained of the longest jump": 1 - value("80 -> 0.002", 0) ** 2,
            "small error after 100 steps of regression": -value("all", 100),
            "small error after 400": -value("all", 400),
        }
        found |= {(row["dataset"], name + end): measures for end in ("", JUMP_END)}
    return found


def tables(datasets: tuple[str, ...]) -> dict[str, str]:
    """What each form explains before training, and how its error falls."""
    found = {}
    for dataset in datasets:
        rows = chosen(read(FILE), dataset=dataset)
        jumps = [f"{t:g} -> {s:g}" for t, s in JUMPS]

        def value(row: Row, jump: str, step: int) -> float:
            return float(chosen(row["curve"], jump=jump, step=step)[0]["value"])

        found[f"Explained before training, {dataset}"] = markdown(
            ("form", *(jump.replace("->", "→") for jump in jumps)),
            [(row["form"], *(f"{1 - value(row, jump, 0) ** 2:.2f}" for jump in jumps)) for row in rows],
        )
        found[f"Error by plain regression, {dataset}"] = markdown(
            (
                "form",
                *(f"{jump.replace('->', '→')} after {step}" for jump in (jumps[0], "all") for step in MOMENTS[1::2]),
            ),
            [
                (
                    row["form"],
                    *(f"{value(row, jump, step):.3f}" for jump in (jumps[0], "all") for step in MOMENTS[1::2]),
                )
                for row in rows
            ],
        )
    return found
