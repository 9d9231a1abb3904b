"""Recipes: each builds, is stored and read back, can be changed by name, and takes a training step when made small."""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.cli.parsing import parse
from fewstep.cli.train import Options as TrainOptions
from fewstep.data.demonstrations.episodes import Demonstrations, save_demonstrations
from fewstep.data.sources import DataConfig, load_dataset
from fewstep.flow.paths import EDM, VP
from fewstep.flow.preconditioning.base import PreconditioningConfig
from fewstep.flow.preconditioning.covariance import PrincipalComponents
from fewstep.flow.preconditioning.estimation import noise_grid
from fewstep.flow.preconditioning.jumps import CMPreconditioning, CMPreconditioningConfig
from fewstep.flow.preconditioning.network_scaling import EDMScalingConfig, IdentityScalingConfig
from fewstep.flow.preconditioning.regression import Measured, Regression
from fewstep.flow.preconditioning.statistics import TrajectoryStatistics
from fewstep.networks.base import TeacherNetworkConfig
from fewstep.networks.dit import DiTConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet import UNetConfig
from fewstep.networks.unet1d import UNet1dConfig
from fewstep.objectives import CD, CTM, LSD, PSD, SCD, Shortcut
from fewstep.recipes import AT_SCALE, RECIPES, recipe
from fewstep.recipes.config import RunConfig, flow_map_config
from fewstep.teachers.diffusers import load_diffusers
from fewstep.training import RunFolder, train_run
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import kind, kind_name
from fewstep.utils.serialization import from_json, to_json
from tests.support.foreign import save_foreign
from tests.support.objectives import made
from tests.support.tiny import RUNTIME

SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "digits": ((1, 8, 8), 10),
    "idx": ((1, 28, 28), 10),
    "mixture": ((1, 4, 4), 0),
    "demonstrations": ((16, 4), 0),
}


def shape_and_classes(config: RunConfig) -> tuple[tuple[int, ...], int]:
    """Of the data that a recipe is made for."""
    if isinstance(config.network, TeacherNetworkConfig):  # the tests' teacher is of digits
        return SHAPES["digits"]
    if kind_name(type(config.data.source)) == "latents":
        return AT_SCALE[config.recipe].shape, AT_SCALE[config.recipe].classes
    if kind_name(type(config.data.source)) == "images":
        return (3, config.data.image_size, config.data.image_size), 3
    return SHAPES[kind_name(type(config.data.source))]


def euler_statistics(shape: tuple[int, ...]) -> TrajectoryStatistics:
    """l = s = 0: what an analytic preconditioning needs to be built."""
    none = torch.zeros(4, dtype=torch.float64)
    mean = torch.zeros(shape, dtype=torch.float64)
    return TrajectoryStatistics.closed_form(noise_grid(EDM(), 4), none, none, mean, 1.0)


def white(shape: tuple[int, ...]) -> Measured:
    """A covariance of one, and a regression that finds nothing else: what any skip needs to be built."""
    mean = torch.zeros(shape, dtype=torch.float64)
    covariance = PrincipalComponents(mean, mean.new_zeros(mean.numel(), 0), mean.new_zeros(0), 1.0)
    table, groups = mean.new_zeros(1, 4, 4), mean.new_zeros(len(covariance.lam))
    return Measured(covariance, Regression(noise_grid(EDM(), 4), table, groups, mean.new_zeros(0, 0), 2, 0))


@pytest.fixture(scope="session")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher of diffusers, for recipes whose parts are their teacher's."""
    folder: Path = tmp_path_factory.mktemp("foreign")
    save_foreign(folder, "UNet2DModel")
    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_its_flow_map(name: str, foreign: Path) -> None:
    config = recipe(name)
    assert config.recipe == name
    shape, classes = shape_and_classes(config)
    teacher = load_diffusers(foreign).config
    found = {"statistics": euler_statistics(shape), "measured": white(shape)}
    settings = flow_map_config(config, shape, 1.0, classes, teacher=teacher, **found)
    with torch.device("meta"):  # shapes without the memory of 700 million weights
        flow_map = settings.build()
    assert (flow_map.sample_shape, flow_map.num_classes) == (shape, classes)


@pytest.mark.parametrize(("name", "millions"), [("imagenet256-dit-b4", 130), ("imagenet256-dit-xl1", 675)])
def test_imagenet_networks_have_the_published_size(name: str, millions: int) -> None:
    """Table 1 of 2212.09748 to within a tenth: gating, norms and embeddings differ a little."""
    config = recipe(name)
    with torch.device("meta"):
        network = config.network.build(AT_SCALE[name].shape, 1000, config.objective.guided)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, rel=0.1)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_its_file(name: str) -> None:
    assert from_json(RunConfig, to_json(recipe(name))) == recipe(name)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_says_what_it_trains(name: str) -> None:
    first = (RECIPES[name].__doc__ or "").strip().splitlines()[0]
    assert len(first) > 30
    assert first.endswith((".", ","))


def test_an_unknown_recipe_lists_the_known() -> None:
    with pytest.raises(ConfigError, match=r"no recipe 'digit'.*digits, digits-flow-matching"):
        recipe("digit")


@pytest.mark.parametrize(
    "objective", [made(LSD, flow_matching_ratio=0.0), made(PSD, flow_matching_ratio=0.0), Shortcut(bootstrap=1.0)]
)
def test_a_run_without_an_anchor_is_refused(objective: LSD | PSD | Shortcut) -> None:
    with pytest.raises(ConfigError, match=r"learns nothing of the data.*why-an-anchor"):
        replace(recipe("digits"), objective=objective)


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three episodes of random actions."""
    steps = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    found = Demonstrations(steps, steps[:, :4], torch.tensor([10, 18, 30]))
    return str(save_demonstrations(found, tmp_path_factory.mktemp("demos") / "toy.safetensors"))


def small(config: RunConfig, demonstrations: str = "") -> RunConfig:
    """A recipe's method on a network and a run of the smallest size."""
    network = config.network
    if isinstance(network, DiTConfig):
        network = replace(network, width=32, depth=1, heads=2)
    elif isinstance(network, UNetConfig):
        network = replace(network, width=8, head_width=8, embedding_width=16, blocks=1)
    elif isinstance(network, UNet1dConfig):
        network = replace(network, width=8, embedding_width=16)
    elif isinstance(network, MLPConfig):
        network = MLPConfig(width=16, depth=1, embedding_width=16)
    training = replace(config.training, images=4, batch_size=2, sample_images=0)
    data = config.data
    if kind_name(type(data.source)) in ("idx", "latents", "images"):  # shapes and labels without the files
        shape, classes = shape_and_classes(config)
        data = DataConfig(source="random", random_shape=shape, random_classes=classes, labels=data.labels)
    data = replace(data, random_count=8, root=demonstrations if data.source.of_actions else "")
    statistics = replace(config.statistics, points=8, samples=8)
    optimizer = replace(config.optimizer, warmup_share=1.0)
    return replace(config, network=network, training=training, data=data, statistics=statistics, optimizer=optimizer)


@pytest.fixture(scope="module")
def begun_from(tmp_path_factory: pytest.TempPathFactory) -> Callable[[RunConfig], Path]:
    """The folder of a run that others distil or start from, trained once."""
    root = tmp_path_factory.mktemp("begun")

    def folder(config: RunConfig) -> Path:
        if not (root / config.recipe).exists():
            train_run(config, load_dataset(config.data), RunFolder(root / config.recipe), RUNTIME)
        return root / config.recipe

    return folder


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_takes_training_steps(
    name: str, tmp_path: Path, demonstrations: str, begun_from: Callable[[RunConfig], Path], foreign: Path
) -> None:
    """Those that distil, or start from a model, do so from the recipe that its folder is named after."""
    config = small(recipe(name), demonstrations)
    if config.objective.needs_teacher and not config.teacher:
        config = replace(config, teacher=str(foreign))
    dataset = load_dataset(config.data)
    for folder in {config.teacher, config.initial} - {"", "teacher", str(foreign)}:
        other = small(recipe(Path(folder).name))
        assert other.data == config.data
        parts = {role: getattr(config, role) for role in ("teacher", "initial")}
        config = replace(config, **{role: str(begun_from(other)) for role, name in parts.items() if name == folder})
    result = train_run(config, dataset, RunFolder(tmp_path / "run"), RUNTIME)
    assert result.step == 2
    (record,) = RunFolder(tmp_path / "run").read_log()
    assert record["loss"] > 0
    assert record["grad_norm"] > 0


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith(("ctm-", "cd-", "digits-scd"))])
def test_students_share_what_they_compare_with_their_teacher(name: str) -> None:
    """The same data, network, path and inner scaling, so that its weights fit and mean the same; a network of
    convolutions is shown its skip besides.
    """
    config = recipe(name)
    teacher = recipe(Path(config.teacher).name)
    assert isinstance(config.objective, CD | CTM | SCD)
    assert teacher.objective.on_diagonal
    assert config.initial == "teacher"
    seen = {"sees_skip": True} if name.startswith("ctm") and isinstance(teacher.network, UNetConfig) else {}
    assert (config.data, config.network) == (teacher.data, replace(teacher.network, **seen))
    assert (config.model.path, config.model.scaling) == (teacher.model.path, teacher.model.scaling)


def test_the_published_depth_of_one_block_takes_a_step(tmp_path: Path) -> None:
    """DiT-B/4 at its own width."""
    config = recipe("imagenet256-dit-b4")
    training = replace(config.training, images=2, batch_size=2, sample_images=0)
    data = DataConfig(source="random", random_shape=(4, 32, 32), random_classes=1000, random_count=4)
    config = replace(config, network=replace(config.network, depth=1), training=training, data=data)
    assert train_run(config, load_dataset(data), RunFolder(tmp_path), RUNTIME).step == 1


KEPT = {"recipe", "a", "b", "classes", "draws", "odds_power", "u", "compare", "components"}
"""Left as they are: a name, times of which one must be 1, and what goes with some settings alone."""


def changed(value: Any, annotation: Any) -> Any:
    """Another value of the same kind for every leaf of a dataclass."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        hints = typing.get_type_hints(type(value))
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.name not in KEPT}
        return replace(value, **{key: changed(item, hints[key]) for key, item in fields.items()})
    if typing.get_origin(annotation) is typing.Literal:
        return next(option for option in reversed(typing.get_args(annotation)) if option != value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value / 2 if value else 0.25
    if isinstance(value, tuple):
        return tuple(changed(item, None) for item in value) or (0.125,)
    if value is None:
        return (0.25, 0.75) if "tuple" in str(annotation) else 0.7
    return f"other{value}"


def options(value: Any, prefix: str = "--") -> Iterator[str]:
    """The command-line words that set every leaf of a dataclass."""
    for field in dataclasses.fields(value):
        item, name = getattr(value, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(item):
            yield from options(item, f"{name}.")
        elif isinstance(item, bool):
            yield name if item else f"{prefix}no-{field.name.replace('_', '-')}"
        elif isinstance(item, tuple):
            yield from (name, *map(str, item))
        else:
            yield from (name, str(item))


@pytest.mark.parametrize(
    "name",
    [
        "digits", "digits-flow-matching", "fashion-mnist-dit", "imagenet256-dit-xl1",
        "edm-fashion-mnist", "ctm-digits", "ctm-fashion-mnist", "cd-digits",
    ],
)  # fmt: skip
def test_every_option_can_be_set_by_name(name: str) -> None:
    """All leaves of a recipe at once, each to another value: the parsed configuration has them all."""
    wanted = changed(recipe(name), RunConfig)
    words = list(options(wanted))
    parsed = parse(TrainOptions, words, f"train {name}", TrainOptions(run=recipe(name)))
    assert parsed.run == wanted
    before, after = leaves(to_json(recipe(name))), leaves(to_json(wanted))
    same = [key for key in before if before[key] == after[key]]
    assert {key.rpartition(".")[2] for key in same} <= KEPT | {"type"}


def leaves(value: Any, where: str = "") -> dict[str, Any]:
    """Values of nested dictionaries by dotted names."""
    if not isinstance(value, dict):
        return {where: value}
    return {key: item for name, inner in value.items() for key, item in leaves(inner, f"{where}.{name}").items()}


def test_dropout_is_refused_where_evaluations_are_compared() -> None:
    network = UNetConfig(dropout=0.1)
    with pytest.raises(ConfigError, match=r"dropout with ISD"):
        replace(recipe("digits-unet"), network=network)
    assert replace(recipe("digits-flow-matching"), network=network).network == network


@pytest.mark.parametrize("name", ["bcm", "cm"])
def test_what_holds_edms_scaling_takes_the_input_scaling_alone(name: str) -> None:
    """Its f and g are EDM's c_skip and c_out: with EDM's scaling they would be counted twice."""
    with pytest.raises(ConfigError, match=f"{name} preconditioning .* edm-input"):
        replace(
            recipe("digits-ct").model, preconditioning=kind(PreconditioningConfig, name), scaling=EDMScalingConfig()
        )


def test_cm_is_for_jumps_to_the_data_end_of_the_edm_path() -> None:
    consistency = recipe("digits-ct")
    model = replace(consistency.model, preconditioning=CMPreconditioningConfig())
    assert replace(consistency, model=model).model == model
    with pytest.raises(ConfigError, match="no velocity, which ISD needs: train CT, ECT or CD with it"):
        replace(recipe("digits"), model=model)
    with pytest.raises(ConfigError, match="take the inner scaling edm-input"):
        replace(model, scaling=IdentityScalingConfig())
    evaluation = replace(consistency.evaluation, gamma=0.5)
    with pytest.raises(ConfigError, match=r"set --evaluation\.gamma 1 in place of 0\.5"):
        replace(consistency, model=model, evaluation=evaluation)
    single = replace(evaluation, steps=(1,))
    assert replace(consistency, model=model, evaluation=single).evaluation == single
    with pytest.raises(ConfigError, match=r"set --evaluation\.gamma 1"):
        replace(consistency, model=model, evaluation=replace(single, curve_images=64, curve_steps=(1, 2)))
    with pytest.raises(ConfigError, match="take the path edm"):
        CMPreconditioningConfig().build(VP(), 0.5)
    assert CMPreconditioningConfig().build(EDM(), 0.5) == CMPreconditioning(0.5, EDM().t_min)
