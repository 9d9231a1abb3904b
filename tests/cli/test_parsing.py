"""Words of a command line: what is said more than once, and what takes several values."""

import pytest

from fewstep.cli.parsing import gathered, lists, parse
from fewstep.cli.sample import Options
from fewstep.cli.train import Options as TrainOptions
from fewstep.recipes import recipe


@pytest.mark.parametrize(
    "words",
    [
        ["--label", "a", "--label", "b"],
        ["--label", "a", "b"],
        ["--label=a", "--label", "b"],
        ["--label", "a", "--steps", "1", "--label", "b"],
    ],
)
def test_an_option_of_several_values_may_be_repeated(words: list[str]) -> None:
    options = parse(Options, ["RUN", *words], "sample")
    assert options.label == ("a", "b")
    assert options.steps == (1 if "--steps" in words else 2)


def test_only_options_of_several_values_are_gathered() -> None:
    words = ["--steps", "1", "--steps", "2", "--label", "-1", "--label", "0"]
    assert gathered(words, {"--label"}) == ["--steps", "1", "--steps", "2", "--label", "-1", "0"]
    assert {"--label", "--prompt", "--times"} <= lists(Options)
    assert not {"--steps", "--count"} & lists(Options)


@pytest.mark.parametrize("word", ["--profile", "--runtime.profile"])
def test_a_run_is_profiled_by_the_short_form_too(word: str) -> None:
    default = TrainOptions(run=recipe("digits"))
    assert not default.runtime.profile
    assert parse(TrainOptions, [word], "train digits", default).runtime.profile


def test_nested_options_are_gathered_too() -> None:
    default = TrainOptions(run=recipe("digits"))
    options = parse(TrainOptions, ["--evaluation.steps", "1", "--evaluation.steps", "3"], "train digits", default)
    assert options.run.evaluation.steps == (1, 3)
