"""The study's cells: data sets, methods and seeds; the data that its own command cuts out of photographs."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import fewstep as fs
from benchmarks.acceleration.students import PLANS, Plan, digest_of
from benchmarks.acceleration.students import methods as of_acceleration
from benchmarks.harness import RESULTS, Grid
from fewstep.data.sources import ImagesSource
from fewstep.evaluation.metrics.features import default_extractor
from fewstep.flow.preconditioning.skip import SkipPreconditioningConfig
from fewstep.recipes import recipe

DATASETS: dict[str, Plan] = {
    "mixture": PLANS["mixture"],
    "digits": PLANS["digits"],
    "fashion": replace(PLANS["fashion"], moments=(25, 50, 100, 200, 300)),
    "photographs": replace(PLANS["fashion"], moments=(25, 50, 100, 200)),
    "digits-classes": PLANS["digits"],
}
LONG = {
    "mixture-long": replace(PLANS["mixture"], moments=(900, 2700, 5400, 8100)),
    "digits-long": replace(PLANS["digits"], moments=(600, 1800, 3600, 5400)),
    "mixture-falling": PLANS["mixture"],
}
"""Nine times as long, for what is gained at last; as long, with a rate that falls to nothing."""
ALL = DATASETS | LONG
TRANSFORMER = fs.DiTConfig(width=64, depth=4, heads=4, patch=2, max_frequency=16.0)
FITTED = (*DATASETS, "digits-transformer")
"""Data sets whose forms are fitted by plain regression: digits by a transformer too."""
PHOTOGRAPHS = fs.DataConfig(ImagesSource(), image_size=32, labels=False)
CALLS = [(measure, calls) for measure in ("sample", "frechet") for calls in (1, 2, 4)]
BASELINE = "euler"
FAMILIES: dict[str, dict[str, Any]] = {
    "covariance": {},
    "regressed": {"family": "regressed"},
    "components": {"family": "regressed-components"},
    "length": {"family": "regressed-length"},
}
"""The skip's families: the Gaussian's map, and what a teacher's trajectories say, as one number, along each component,
and with the Gaussian's lengths."""
JUMP_END = ", jump end"
"""Of a method's name: jumps are compared where they end, not at the data end."""
DRAWS = ", published draws"
"""Of a method's name: t, u and s are drawn as CTM's published code does, the length of the teacher's walk first."""
EVEN = ", even draws"
"""Of a method's name: as the published draws, but all lengths of the walk are as likely."""
ONE_CALL = ", DPM-Solver++"
"""Of a method's name: the teacher walks by DPM-Solver++, which calls it once a cell where Heun's method calls twice."""
FEW = ", few trajectories"
"""Of a method's name: 125 trajectories at 24 levels are regressed on in place of 1,000 at 48."""
CARRIED = ", carried"
"""Of a method's name: errors at a jump's end are carried to the data end by the data's covariance."""
INTERMEDIATE = ", intermediate"
"""Of a method's name: the weight of jumps that stop in between has half the power."""
RESCALED = "analytic, rescaled start"
"""The computed preconditioning with Euler's weight of the network."""
CLASSES = {", class means": "origin", ", classes": "covariance"}
"""Of a method's name: a mean for each class, or a mean and a covariance, in place of those of all data."""
COMPONENTS = "components"
DRAWN = (
    BASELINE, "analytic", "regressed", COMPONENTS,
    *(name + JUMP_END for name in (BASELINE, "covariance", "regressed", COMPONENTS, "length")),
)  # fmt: skip
"""Methods that are measured with these draws too."""
BEST = "regressed" + JUMP_END
LASTING = (BASELINE + DRAWS, BEST + DRAWS)
"""Methods that are trained for long."""


def base_methods(dataset: str) -> dict[str, fs.RunConfig]:
    """The methods of `acceleration`; on photographs Fashion-MNIST's with its network; of digits by a transformer."""
    if plain(dataset) == "photographs":
        return {name: replace(config, data=PHOTOGRAPHS) for name, config in of_acceleration("fashion").items()}
    known = of_acceleration(plain(dataset))
    if dataset == "digits-transformer":
        return {name: replace(config, network=TRANSFORMER) for name, config in known.items()}
    return known


_LENGTH = "length" + JUMP_END
_COVARIANCE = "covariance" + JUMP_END
_COMPARED = tuple(name + place for name in (BASELINE, "analytic", *FAMILIES) for place in ("", JUMP_END))
"""Euler's, the computed preconditioning and every family, with both comparisons."""
_WALK_FIRST = (BASELINE + DRAWS, BEST + DRAWS, BEST + EVEN, _LENGTH + DRAWS)
"""What draws the length of the walk first, on digits and images."""
_COMPONENTS, _EVEN_COMPONENTS = (
    tuple(COMPONENTS + place + draws for place in ("", JUMP_END)) for draws in (DRAWS, EVEN)
)
_ON_DIGITS = ("analytic" + DRAWS, BEST + DRAWS + ONE_CALL, BEST + DRAWS + ONE_CALL + FEW)
_ONE_THING = (BASELINE + JUMP_END + DRAWS, "regressed" + DRAWS)
"""With the published draws, the comparison alone and the skip alone."""
_ON_CLASSES = (
    BASELINE, BASELINE + DRAWS, "analytic", "analytic, class means", BEST + DRAWS, BEST + DRAWS + ", class means",
    *(_COVARIANCE + DRAWS + which for which in ("", *CLASSES)),
)  # fmt: skip
EVERY_SEED: dict[str, tuple[str, ...]] = {
    "digits": (*_COMPARED, *_WALK_FIRST, *_ON_DIGITS, COMPONENTS + DRAWS),
    "fashion": (*_COMPARED, *_WALK_FIRST, BEST + DRAWS + ONE_CALL),
    "photographs": (*_COMPARED, *_WALK_FIRST, *_COMPONENTS),
    "digits-classes": _ON_CLASSES,
}
"""Methods of a data set that every seed is trained with; without an entry all but those of SOME_SEEDS."""
SOME_SEEDS: dict[str, dict[int, tuple[str, ...]]] = {
    "mixture": dict.fromkeys((0, 1), _EVEN_COMPONENTS),
    "digits": {**dict.fromkeys((1, 2), _ONE_THING), 0: (*_ONE_THING, "regressed" + EVEN, _COVARIANCE + DRAWS)},
    "fashion": {0: (_COVARIANCE + DRAWS, *_COMPONENTS, *_EVEN_COMPONENTS)},
    "photographs": {0: (*_EVEN_COMPONENTS, COMPONENTS + DRAWS + ONE_CALL)},
}
"""By data set and seed, the others that are trained."""


@cache
def methods(dataset: str) -> dict[str, fs.RunConfig]:
    """Every method on a data set: Euler's, at the data end, drawn uniformly, and its changes. U-Nets see their skip."""
    plan, known = ALL[dataset], base_methods(dataset)
    euler = known["euler"]
    euler = replace(euler, training=replace(euler.training, images=plan.moments[-1] * euler.training.batch_size))
    euler = replace(euler, data=replace(euler.data, labels=True)) if dataset == "digits-classes" else euler

    def skip(seen: bool, **settings: Any) -> fs.RunConfig:
        model = replace(euler.model, preconditioning=SkipPreconditioningConfig(**settings))
        return replace(euler, model=model, network=replace(euler.network, sees_skip=seen))  # type: ignore[call-arg]

    seen = isinstance(euler.network, fs.UNetConfig)
    forms = {BASELINE: euler, "analytic": replace(euler, model=known["analytic"].model)}
    forms |= {name: skip(seen, **settings) for name, settings in FAMILIES.items()}
    forms |= {"covariance, seen": skip(True)} if dataset == "mixture" else {}
    at_end = replace(euler.objective, compare="jump-end")  # type: ignore[call-arg]
    forms |= {name + JUMP_END: replace(form, objective=at_end) for name, form in forms.items()}
    forms |= {name + DRAWS: _stepped(forms[name], draws="published") for name in DRAWN}
    evenly = (BEST, "regressed", COMPONENTS, COMPONENTS + JUMP_END)
    forms |= {name + EVEN: _stepped(forms[name + DRAWS], odds_power=0.0) for name in evenly}
    if dataset.endswith("-falling"):
        falling = replace(euler.optimizer, decay="cosine")
        return {name: replace(forms[name], optimizer=falling) for name in (BASELINE, *LASTING)}
    if dataset in LONG:
        return {name: forms[name] for name in LASTING}
    quick = (COMPONENTS if dataset == "photographs" else BEST) + DRAWS
    forms[quick + ONE_CALL] = _stepped(forms[quick], solver="dpm-solver++")
    if dataset == "digits":
        forms[quick + ONE_CALL + FEW] = _of_skip(forms[quick + ONE_CALL], trajectories=125, levels=24)
    if dataset == "mixture":
        forms |= _extras(forms)
    if dataset == "digits-classes":
        means = replace(euler.statistics, classes="origin")
        forms["analytic, class means"] = replace(forms["analytic"], statistics=means)
        for name, which in CLASSES.items():
            forms |= {form + name: _of_skip(forms[form], classes=which) for form in (BEST + DRAWS, _COVARIANCE + DRAWS)}
    return {name: forms[name] for name in _ON_CLASSES} if dataset == "digits-classes" else forms


def _extras(forms: dict[str, fs.RunConfig]) -> dict[str, fs.RunConfig]:
    """Other weights of a jump's errors, and of the network under the computed preconditioning."""
    analytic, best = forms["analytic"], forms[BEST + DRAWS]
    weight = replace(analytic.model.preconditioning, weight="euler")  # type: ignore[call-arg]
    extra = {
        RESCALED: replace(analytic, model=replace(analytic.model, preconditioning=weight)),
        BEST + DRAWS + INTERMEDIATE: replace(best, objective=replace(best.objective, intermediate=0.5)),  # type: ignore[call-arg]
    }
    for name in (_LENGTH, _LENGTH + DRAWS):
        objective = replace(forms[name].objective, carried="covariance")  # type: ignore[call-arg]
        extra[name + CARRIED] = replace(forms[name], objective=objective)
    return extra


def _of_skip(config: fs.RunConfig, **changes: Any) -> fs.RunConfig:
    """The same, with another skip."""
    skip = replace(config.model.preconditioning, **changes)
    return replace(config, model=replace(config.model, preconditioning=skip))


def plain(dataset: str) -> str:
    """The data set without how long, at which rate or with which condition its students are trained."""
    return dataset.split("-")[0]


def _stepped(config: fs.RunConfig, **changes: Any) -> fs.RunConfig:
    """The same, with another walk of the teacher."""
    assert isinstance(config.objective, fs.CTM)
    return replace(config, objective=replace(config.objective, steps=replace(config.objective.steps, **changes)))


@dataclass(frozen=True)
class Cell:
    """A student: data set (a key of DATASETS), method and seed."""

    dataset: str
    method: str
    seed: int


def settings(cell: Cell) -> str:
    """The digest of what a cell trains and how it is measured, whatever its seed and teacher."""
    return digest_of(methods(cell.dataset)[cell.method], ALL[cell.dataset])


def plan() -> Iterator[Cell]:
    """Five seeds of mixture and digits, three of the others and of what is trained for long; of SOME_SEEDS fewer."""
    for dataset in ALL:
        seeds = range(5 if dataset in ("mixture", "digits") else 3)
        some = SOME_SEEDS.get(dataset, {})
        every = (name for name in methods(dataset) if all(name not in more for more in some.values()))
        yield from (Cell(dataset, name, seed) for name in EVERY_SEED.get(dataset, every) for seed in seeds)
        yield from (Cell(dataset, name, seed) for seed, more in some.items() for name in more)


GRID = Grid(RESULTS / "skip.jsonl", ("dataset", "method", "seed"), plan, settings)


def photographs(folder: Path, labels: bool) -> fs.Dataset:
    """Crops as `photographs.py apart FOLDER` cuts them: those held out are of other photographs. labels: which one."""
    train, heldout = (
        fs.load_dataset(replace(PHOTOGRAPHS, root=str(folder / part), labels=labels, heldout=0.001))
        for part in ("train", "heldout")
    )
    return replace(train, heldout=heldout.train)


def loaded(dataset: str, folder: Path | None, labels: bool = False) -> fs.Dataset:
    """The data set, with its classes if asked for; folder: of the photographs."""
    if plain(dataset) != "photographs":
        data = base_methods(dataset)[BASELINE].data
        return fs.load_dataset(replace(data, labels=True) if labels or dataset == "digits-classes" else data)
    if folder is None:
        raise SystemExit("photographs: give --data FOLDER, as `python benchmarks/photographs.py apart FOLDER` cuts it")
    return photographs(folder, labels)


def scene(dataset: str, teacher: Path, folder: Path | None, cache: Path | None) -> tuple[Any, ...]:
    """The teacher, the data, and the features of a classifier of the same data."""
    extractor = default_extractor(loaded(dataset, folder, labels=True), cache=cache)
    return fs.load(teacher).flow_map, loaded(dataset, folder), extractor


def teacher_of(dataset: str) -> fs.RunConfig:
    """The recipe of a data set's teacher; on photographs that of Fashion-MNIST."""
    if dataset == "digits-classes":
        config = teacher_of("digits")
        return replace(config, recipe=f"edm-{dataset}", data=replace(config.data, labels=True))
    if dataset == "digits-transformer":
        return replace(teacher_of("digits"), recipe=f"edm-{dataset}", network=TRANSFORMER)
    if dataset != "photographs":
        return recipe(f"edm-{dataset}".replace("fashion", "fashion-mnist"))
    return replace(recipe("edm-fashion-mnist"), recipe="edm-photographs", data=PHOTOGRAPHS)
