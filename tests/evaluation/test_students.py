"""Students beside their teachers: the times they are compared at, which recipe belongs to which teacher, the cost."""

import pytest
import torch

from fewstep.data.sources import DataConfig, load_dataset
from fewstep.evaluation.align import (
    alignment_line,
    alignment_times,
    student_recipe,
    teacher_name,
    with_labels,
)
from fewstep.flow.paths import EDM, VP, Linear, Path, Trig
from fewstep.recipes import recipe
from fewstep.utils.errors import ConfigError


@pytest.mark.parametrize("path", [EDM(), Linear(), Trig(0.5), VP()])
def test_times_of_alignment_are_noise_levels_between_the_ends(path: Path) -> None:
    times = alignment_times(path)
    assert (float(times[0]), float(times[-1])) == (path.t_max, path.t_min)
    assert bool((times.diff() < 0).all())
    assert path.tau(times[1:-1]).tolist() == pytest.approx([12.9, 1.92, 0.585], rel=0.01)


def test_a_short_path_is_compared_at_the_levels_it_has() -> None:
    assert alignment_times(EDM(0.1, 10.0)).tolist() == pytest.approx([10.0, 1.92, 0.585, 0.1], rel=0.01)


def test_the_student_of_a_teacher() -> None:
    for name in ("digits", "mixture", "fashion-mnist"):
        found = student_recipe(recipe(f"edm-{name}"))
        assert found is not None
        assert found.recipe == f"ctm-{name}"
    assert student_recipe(recipe("digits")) is None
    assert student_recipe(recipe("digits"), "cd-digits") == recipe("cd-digits")
    with pytest.raises(ConfigError, match=r"'digits' distils no teacher; students: ctm-digits"):
        student_recipe(recipe("edm-digits"), "digits")
    with pytest.raises(ConfigError, match="no recipe"):
        student_recipe(recipe("edm-digits"), "ctm")


def test_a_teacher_that_is_gone_is_named_after_its_folder() -> None:
    assert teacher_name(recipe("ctm-digits")) == "edm-digits"


def test_labels_come_back_for_the_same_samples() -> None:
    data = DataConfig(source="digits", labels=False)
    bare = load_dataset(data)
    labelled = with_labels(data, bare)
    assert (bare.num_classes, labelled.num_classes) == (0, 10)
    assert torch.equal(labelled.heldout.values, bare.heldout.values)
    assert with_labels(DataConfig(), labelled) is labelled


def test_the_worst_jump_is_named() -> None:
    jumps = {"times": [80.0, 1.9, 0.002], "rmse": [[None, 0.1, 0.3], [None, None, 0.2], [None] * 3], "samples": 512}
    walks = [{"steps": 1, "rmse": 0.3}, {"steps": 2, "rmse": 0.15}]
    line = alignment_line({"teacher": "edm-digits", "jumps": jumps, "trajectories": walks})
    assert "0.3 in 1, 0.15 in 2 steps" in line
    assert line.endswith("its worst jump 0.3 (80 to 0.002)")
