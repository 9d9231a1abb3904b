"""The short help: what people change, with the recipe's values, and nothing that the recipe cannot use."""

import subprocess
import sys

import pytest

from fewstep.cli.help import CHANGED, usable, words_of
from fewstep.cli.main import main
from fewstep.cli.parsing import parse
from fewstep.cli.train import Options
from fewstep.cli.usage import recipe_names
from fewstep.networks.dit import DiTConfig
from fewstep.recipes import RECIPES, recipe
from fewstep.recipes.config import TrainingConfig
from tests.support.commands import ENVIRONMENT


def helped(capsys: pytest.CaptureFixture[str], name: str, *words: str) -> list[str]:
    """The options that `fewstep train NAME WORDS --help` shows."""
    with pytest.raises(SystemExit) as stop:
        parse(Options, [*words, "--help"], f"train {name}", Options(run=recipe(name)))
    assert not stop.value.code
    return [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")]


def test_words_are_those_under_each_field() -> None:
    assert words_of(TrainingConfig)["images"] == "How long to train."
    assert words_of(DiTConfig)["depth"] == "Transformer blocks."


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_s_help_is_short_and_has_words(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = helped(capsys, name)
    assert 15 <= len(shown) <= len(CHANGED)
    assert {"--training.images", "--out", "--optimizer.lr", "--network"} <= set(shown)


def test_what_a_recipe_cannot_use_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--teacher" not in helped(capsys, "digits")
    assert "--teacher" in helped(capsys, "ctm-digits")
    assert "--objective.guidance.omega" in helped(capsys, "digits")
    assert "--objective.guidance.omega" not in helped(capsys, "digits-flow-matching")
    policy = next(name for name in RECIPES if recipe(name).data.source.of_actions)
    assert not usable(recipe(policy), "training.flip")
    assert "--training.flip" not in helped(capsys, policy)


def test_a_kind_that_is_asked_for_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--network.heads" not in helped(capsys, "digits")
    assert {"--network.heads", "--network.mlp-ratio"} <= set(helped(capsys, "digits", "--network", "dit"))


def test_the_values_are_the_run_s(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "digits", "--network", "dit", "--help"])
    printed = capsys.readouterr().out
    assert "--network dit " in printed
    assert f"--network.depth {DiTConfig().depth} " in printed
    assert "--help-all" in printed


def test_help_is_there_at_once() -> None:
    """Without PyTorch, whose import alone takes seconds; the recipes that it lists are all of them, in their order."""
    script = "import sys; from fewstep.cli.main import main; sys.exit(main(sys.argv[1:]) or 'torch' in sys.modules)"
    for words in ([], ["--help"], ["train", "--help"], ["trian"]):
        done = subprocess.run([sys.executable, "-c", script, *words], env=ENVIRONMENT, capture_output=True, check=False)
        assert done.returncode == (2 if words == ["trian"] else 0), done.stderr.decode()
    assert recipe_names() == list(RECIPES)


def test_settings_of_other_data_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert not {"--data.root", "--data.image-size", "--data.value-range"} & set(helped(capsys, "digits"))
    photos = set(helped(capsys, "photos-64"))
    assert {"--data.root", "--data.image-size", "--data.heldout"} <= photos
    assert "--data.value-range" not in photos
    assert "--data.heldout" not in helped(capsys, "photos-32-latents")


def test_a_command_that_is_misspelt_is_suggested(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_with_other_parts_the_recipe_s_figures_are_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    def about(*words: str) -> str:
        with pytest.raises(SystemExit):
            parse(Options, [*words, "--help"], "train digits", Options(run=recipe("digits")))
        return capsys.readouterr().out.split("  --out")[0]

    assert "Frechet" in about()
    assert "Frechet" not in about("--objective", "mean-flow")
    assert "Here with objective mean-flow." in about("--objective", "mean-flow")
