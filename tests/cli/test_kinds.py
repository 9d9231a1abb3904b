"""Settings whose kind the command line chooses."""

from dataclasses import dataclass, replace
from typing import get_type_hints

import pytest

from fewstep.cli.kinds import choices, choose_kinds
from fewstep.cli.parsing import parse
from fewstep.cli.train import Options as TrainOptions
from fewstep.flow.guidance import DrawnGuidance, FixedGuidance, NoGuidance
from fewstep.flow.preconditioning.network_scaling import EDMInputScalingConfig
from fewstep.flow.times import BetaTimes, LogitNormalTimes, UniformTimes
from fewstep.networks.dit import DiTConfig
from fewstep.networks.mlp import MLPConfig
from fewstep.networks.unet import UNetConfig
from fewstep.networks.unet1d import UNet1dConfig
from fewstep.objectives import ISD, MeanFlow
from fewstep.recipes import RECIPES, recipe
from fewstep.recipes.config import RunConfig
from fewstep.utils.errors import ConfigError
from fewstep.utils.parts import concrete_classes, is_own, kind_name
from tests.support.objectives import changed, made

DIGITS = recipe("digits")


def chosen(words: str) -> RunConfig:
    config, rest = choose_kinds(DIGITS, words.split())
    assert rest == []
    return config


def test_the_names_are_the_classes_without_what_all_of_them_end_in() -> None:
    classes = (LogitNormalTimes, DiTConfig, UNetConfig, UNet1dConfig, NoGuidance, ISD, EDMInputScalingConfig)
    assert [kind_name(cls) for cls in classes] == ["logit-normal", "dit", "unet", "unet1d", "no", "isd", "edm-input"]


def test_a_kind_comes_with_its_own_defaults() -> None:
    assert chosen("--network dit") == replace(DIGITS, network=DiTConfig())
    assert chosen("--objective mean-flow").objective == MeanFlow()


def test_a_kind_within_another_keeps_the_rest() -> None:
    assert isinstance(DIGITS.objective, ISD)
    assert chosen("--objective.pairs.times=beta").objective == changed(DIGITS.objective, times=BetaTimes())
    assert chosen("--objective.guidance drawn").objective == replace(DIGITS.objective, guidance=DrawnGuidance())


@pytest.mark.parametrize(
    "words",
    ["--objective.pairs.times uniform --objective mean-flow", "--objective Mean_Flow --objective.pairs.times=Uniform"],
)
def test_their_order_does_not_matter(words: str) -> None:
    assert chosen(words).objective == made(MeanFlow, times=UniformTimes())


def test_the_kind_that_it_has_already_changes_nothing() -> None:
    assert isinstance(DIGITS.network, MLPConfig)
    assert DIGITS.network != MLPConfig()
    assert chosen("--network mlp --objective.guidance fixed") == DIGITS


def test_the_last_of_two_counts() -> None:
    assert chosen("--network dit --network unet").network == UNetConfig()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--network cnn", r"--network must be one of teacher, dit, mlp, .*unet, unet1d.*; got cnn"),
        ("--network DiT-L", "got DiT-L"),
        ("--network", r"--network must be one of teacher, dit, mlp, .*unet, unet1d.*; got nothing"),
        ("--network --out x", "got nothing"),
        ("--objective.pairs.times= ", "--objective.pairs.times must be one of uniform, beta, logit-normal, log-normal"),
    ],
)
def test_a_kind_that_is_not_there_is_named(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_kinds(DIGITS, words.split())


def test_other_words_are_left() -> None:
    words = ["--network.width", "8", "--out", "network"]
    assert choose_kinds(DIGITS, words) == (DIGITS, words)


def test_the_command_line_sets_fields_of_the_kind_it_chose() -> None:
    words = "--objective mean-flow --objective.guidance fixed --objective.guidance.omega 2 --network.depth 3"
    found = parse(TrainOptions, words.split(), "train digits", TrainOptions(run=DIGITS)).run
    assert found.objective == MeanFlow(guidance=FixedGuidance(omega=2.0))
    assert found.network == replace(DIGITS.network, depth=3)


def test_a_field_of_another_kind_is_refused() -> None:
    words = ["--network", "dit", "--network.expansion", "2"]
    with pytest.raises(ConfigError, match=r"unknown option --network\.expansion"):
        parse(TrainOptions, words, "train digits", TrainOptions(run=DIGITS))


def test_an_option_like_a_choice_is_hinted_at() -> None:
    with pytest.raises(ConfigError, match=r"unknown option --networks; did you mean --network\?"):
        parse(TrainOptions, ["--networks", "dit"], "train digits", TrainOptions(run=DIGITS))


def test_only_options_name_kinds() -> None:
    assert choose_kinds(DIGITS, ["__network", "dit"]) == (DIGITS, ["__network", "dit"])


@pytest.mark.parametrize(
    ("owner", "field"),
    [(DIGITS, "network"), (DIGITS, "objective"), (DIGITS.objective.pairs, "times"), (DIGITS.objective, "guidance")],
)
def test_no_two_kinds_of_a_setting_share_a_name(owner: object, field: str) -> None:
    own = [cls for cls in concrete_classes(get_type_hints(type(owner))[field]) if is_own(cls)]
    assert len({kind_name(cls) for cls in own}) == len(own) > 1


@pytest.mark.parametrize("words", ["--help-all", "--network --help-all"])
def test_help_lists_the_kinds(words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")  # a narrow one breaks the lines
    with pytest.raises(SystemExit):
        parse(TrainOptions, words.split(), "train digits", TrainOptions(run=DIGITS))
    printed = capsys.readouterr().out
    assert "--network {teacher,dit,mlp," in printed
    assert "--objective.pairs.times {uniform,beta,logit-normal,log-normal" in printed  # and other tests' own


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_has_its_own_kinds_among_the_choices(name: str) -> None:
    settings = recipe(name)
    for path, annotation in choices(settings):
        value: object = settings
        for part in path.split("."):
            value = getattr(value, part)
        assert type(value) in concrete_classes(annotation)


def test_a_setting_that_may_be_none_is_no_choice() -> None:
    @dataclass(frozen=True)
    class Settings:
        inner: MLPConfig | UNetConfig | None = MLPConfig()

    assert list(choices(Settings())) == []
