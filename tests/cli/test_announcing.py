"""What `fewstep train` says before the first step."""

import pytest

from fewstep.cli.announcing import Announcer
from fewstep.training import Start


@pytest.mark.parametrize(
    ("step", "said"), [(0, "of 64\n"), (5, "; goes on from step 5\n"), (16, "; all of them are done\n")]
)
def test_where_a_run_goes_on_is_said(step: int, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Announcer().start(Start("digits", "MLP", 10, 10, "CPU", 1, 1, step, images=1000, seconds=0.0, batch_size=64))
    assert capsys.readouterr().out.endswith(said)
