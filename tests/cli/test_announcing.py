"""What `fewstep train` says before the first step."""

import pytest
import torch

from fewstep.cli.announcing import Announcer
from fewstep.recipes import recipe
from fewstep.training import Start
from fewstep.training.callbacks import start_of


@pytest.mark.parametrize(
    ("step", "said"), [(0, "of 64\n"), (5, "; goes on from step 5\n"), (16, "; all of them are done\n")]
)
def test_where_a_run_goes_on_is_said(step: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Announcer().start(Start("digits", "MLP", 10, 10, "CPU", 1, 1, step, images=1000, seconds=0.0, batch_size=64))
    assert capsys.readouterr().out.endswith(said)


def test_samples_have_the_name_of_their_data(capsys: pytest.CaptureFixture[str]) -> None:
    begun = start_of(recipe("policy-mlp"), torch.nn.Linear(2, 2), torch.device("cpu"), 1, 0)
    Announcer().start(begun)
    assert "chunks in" in capsys.readouterr().out
    assert start_of(recipe("digits"), torch.nn.Linear(2, 2), torch.device("cpu"), 1, 0).unit == "image"
