"""A dimension that does not vary takes no part: not in the loss, nor in sigma_data, nor in what a policy answers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data.base import Dataset
from fewstep.data.demonstrations.episodes import Demonstrations, load_demonstrations, save_demonstrations
from fewstep.utils.errors import DataError, FewstepWarning
from tests.support.inputs import demonstrations
from tests.support.sources import load, refused


def policy_data(file: Path, **settings: object) -> Dataset:
    dataset = load("demonstrations", file, **settings)
    assert dataset.policy is not None
    return dataset


@pytest.mark.parametrize("constant", [0.3, 1500.0, -1e-6, 0.0])
@pytest.mark.parametrize("rounding", [0.0, 1e-8])
def test_a_constant_action_counts_nowhere(tmp_path: Path, constant: float, rounding: float) -> None:
    file = demonstrations(tmp_path / "a.npz", constant)
    arrays = dict(np.load(file))
    noise = np.random.default_rng(1).normal(size=len(arrays["actions"]))
    arrays["actions"][:, 2] *= 1 + rounding * noise
    np.savez(file, **arrays)
    dataset = policy_data(file)
    assert dataset.policy is not None
    assert dataset.train.constant == (2,)
    assert dataset.summary.endswith("; action 2 never varies")
    np.savez(tmp_path / "live.npz", **(arrays | {"actions": arrays["actions"][:, :2]}))
    live = policy_data(tmp_path / "live.npz")
    assert (dataset.mean, dataset.sigma_data) == (live.mean, live.sigma_data)
    mask = dataset.train.context(torch.arange(50)).loss_mask
    own = live.train.context(torch.arange(50)).loss_mask
    assert mask is not None
    assert own is not None
    assert torch.equal(mask[..., :2], own.expand(-1, -1, 2))
    assert not mask[..., 2].any()
    answered = dataset.policy.actions.decode(torch.randn(7, 3))[:, 2]
    torch.testing.assert_close(answered, torch.full((7,), constant), rtol=1e-6, atol=1e-9)
    assert not dataset.train.fetch(torch.arange(50))[0][..., 2].any()


def test_a_constant_observation_is_not_seen_whatever_it_becomes(tmp_path: Path) -> None:
    file = demonstrations(tmp_path / "a.npz")
    arrays = dict(np.load(file))
    arrays["observations"] = np.concatenate([arrays["observations"], np.full((800, 1), 42.0)], 1)
    np.savez(file, **arrays)
    spec = policy_data(file).policy
    assert spec is not None
    seen = torch.from_numpy(arrays["observations"][:3])
    seen[:, -1] = torch.tensor([42.0, -1e6, 43.0])
    assert not spec.observations.encode(seen)[:, -1].any()


def test_actions_that_are_all_constant_are_refused(tmp_path: Path) -> None:
    file = demonstrations(tmp_path / "a.npz", actions=np.ones((800, 3), np.float32))
    refused("demonstrations", file, "actions that vary by less than 1e-4")


@pytest.mark.parametrize("what", ["actions", "observations"])
def test_a_value_that_squeezes_all_others_is_named(tmp_path: Path, what: str) -> None:
    arrays = dict(np.load(demonstrations(tmp_path / "a.npz")))
    arrays[what][300, 1] = 1000.0
    np.savez(tmp_path / "b.npz", **arrays)
    message = rf"b\.npz: {what[:-1]} 1 is 1000 at step 300 but mostly from -[\d.]+ to [\d.]+, "
    with pytest.warns(FewstepWarning, match=message):
        policy_data(tmp_path / "b.npz", heldout=0.01)


def bounded(low: object, high: object, file: Path) -> Demonstrations:
    return load_demonstrations(demonstrations(file, action_low=low, action_high=high))


def test_bounds_may_be_one_value_and_one_number_may_stand_for_all(tmp_path: Path) -> None:
    found = bounded([-1, -1, 0.3], [1, 1, 0.3], tmp_path / "a.npz")
    assert found.action_low == (-1.0, -1.0, 0.3)
    found = bounded(-2.0, np.float32(2), tmp_path / "b.npz")
    assert (found.action_low, found.action_high) == ((-2.0,) * 3, (2.0,) * 3)
    again = load_demonstrations(save_demonstrations(found, tmp_path / "c.safetensors"))
    assert again.action_low == found.action_low
    with pytest.raises(DataError, match=r"the first below the second"):
        bounded(1.0, -1.0, tmp_path / "d.npz")
    with pytest.raises(DataError, match=r"e\.npz: action_low is 'low': give one number"):
        bounded("low", 1.0, tmp_path / "e.npz")


def test_actions_are_kept_within_bounds_of_one_value(tmp_path: Path) -> None:
    file = demonstrations(tmp_path / "a.npz", action_low=[-1, -1, 0.3], action_high=[1, 1, 0.3])
    spec = policy_data(file).policy
    assert spec is not None
    actions: Tensor = spec.bounded(torch.randn(4, 3))
    torch.testing.assert_close(actions[:, 2], torch.full((4,), 0.3))
