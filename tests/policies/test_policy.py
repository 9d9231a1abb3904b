"""Policies: shapes, bounds, noise that depends on the decision and the episode alone, memory, storage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep.policies.policy import Policy, load_policy
from fewstep.sampling.pipeline import Pipeline
from fewstep.training import load
from fewstep.utils.errors import CheckpointError, ConfigError, ShapeError
from tests.support.pointtask import seeing


def test_chunks_have_the_shape_and_stay_within_the_bounds(point_run: Path) -> None:
    policy = load_policy(point_run, steps=2)
    chunk = policy.predict_chunk(torch.tensor([[[-0.9, -0.9, 0.9, 0.9]] * 2, [[0.9, 0.9, -0.9, -0.9]] * 2]))
    assert chunk.shape == (2, 4, 2)
    assert chunk.abs().max() <= 1
    assert (chunk[0].mean(0) > 0.5).all()  # each towards its goal
    assert (chunk[1].mean(0) < -0.5).all()


def test_the_noise_depends_on_the_decision_and_the_episode_alone(point_run: Path) -> None:
    policy, obs = load_policy(point_run), torch.zeros(3, 2, 4)
    whole = policy.predict_chunk(obs, decision=5)
    alone = policy.predict_chunk(obs[:1], decision=5, episodes=torch.tensor([2]))
    torch.testing.assert_close(alone[0], whole[2], rtol=0, atol=1e-6)
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(policy.predict_chunk(obs, decision=6), whole)
    assert not torch.equal(load_policy(point_run, seed=1).predict_chunk(obs, decision=5), whole)


def test_actions_are_those_of_the_chunks_one_by_one(point_run: Path) -> None:
    policy = load_policy(point_run)
    seen = [torch.randn(4, generator=torch.Generator().manual_seed(k)) * 0.3 for k in range(9)]
    taken = torch.stack([policy.select_action(each) for each in seen])
    first = policy.predict_chunk(torch.stack([seen[0], seen[0]])[None], 0)[0]
    second = policy.predict_chunk(torch.stack([seen[3], seen[4]])[None], 1)[0]
    torch.testing.assert_close(taken[:4], first)
    torch.testing.assert_close(taken[4:8], second)
    policy.reset()
    other = policy.predict_chunk(torch.stack([seen[0], seen[0]])[None], 0, torch.tensor([1]))[0]
    torch.testing.assert_close(policy.select_action(seen[0]), other[0])  # another episode, other noise
    assert not torch.equal(other[0], first[0])


@pytest.mark.parametrize("kind", ["numpy", "reversed", "double", "int64"])
def test_observations_of_any_number_type_are_taken(point_run: Path, kind: str) -> None:
    policy = load_policy(point_run)
    whole = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]])
    backwards = whole.flip(0, 1).numpy()[::-1, ::-1]
    given: Any = {"numpy": whole.numpy(), "reversed": backwards, "double": whole.double(), "int64": whole}[kind]
    assert torch.equal(policy.predict_chunk(given[None]), policy.predict_chunk(whole.float()[None]))
    action = policy.select_action(given[0])
    assert action.dtype == torch.float32
    with pytest.raises(ShapeError, match="holds no numbers"):
        policy.select_action(np.array(["far"] * 4))
    assert torch.equal(load_policy(point_run).select_action(whole[0].float()), action)


def test_the_control_travels_with_the_weights(point_run: Path, tmp_path: Path) -> None:
    pipeline = load(point_run)
    pipeline.save_pretrained(tmp_path)
    obs = torch.zeros(1, 2, 4)
    torch.testing.assert_close(load_policy(tmp_path).predict_chunk(obs), load_policy(point_run).predict_chunk(obs))
    assert load_policy(tmp_path).spec == pipeline.config.policy
    assert pipeline.config.policy is not None
    assert pipeline.config.policy.action_low == (-1.0, -1.0)


@pytest.mark.parametrize(
    ("shape", "said"), [((1, 2, 3), r"\(1, 2, 3\).*\(B, 2, 4\)"), ((2, 4), r"\(2, 4\)"), ((0, 2, 4), r"\(0, 2, 4\)")]
)
def test_wrong_shapes_are_refused(point_run: Path, shape: tuple[int, ...], said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        load_policy(point_run).predict_chunk(torch.zeros(shape))


def test_numbers_that_are_not_finite_are_refused(point_run: Path) -> None:
    policy, obs = load_policy(point_run), torch.zeros(2, 2, 4)
    obs[1, 0, 3] = torch.nan
    with pytest.raises(ShapeError, match=r"observation 1 is not finite \(its number 3\)"):
        policy.predict_chunk(obs)
    with pytest.raises(ShapeError, match="number 2"):
        policy.select_action(seeing(0, 0, torch.inf, 0))
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        policy.select_action(seeing(0, 0, 0))


@pytest.mark.parametrize("episodes", [torch.tensor([1]), torch.tensor([0.0, 1.0]), [0, 1]])
def test_episodes_must_be_whole_numbers_one_for_each(point_run: Path, episodes: Any) -> None:
    with pytest.raises(ShapeError, match="give a tensor of 2 whole numbers"):
        load_policy(point_run).predict_chunk(torch.zeros(2, 2, 4), episodes=episodes)


def regression(pipeline: Pipeline) -> Pipeline:
    """The same policy, taken for one of a regression."""
    assert pipeline.config.policy is not None
    policy = replace(pipeline.config.policy, sampler="mean")
    return Pipeline(pipeline.flow_map, replace(pipeline.config, policy=policy))


def test_what_is_no_policy_is_refused(point_run: Path, tmp_path: Path) -> None:
    pipeline = load(point_run)
    with pytest.raises(ConfigError, match="0 steps"):
        Policy(pipeline, steps=0)
    with pytest.raises(ConfigError, match="regression takes 1"):
        Policy(regression(pipeline), steps=2)
    Pipeline(pipeline.flow_map).save(tmp_path)
    with pytest.raises(CheckpointError, match="no policy"):
        load_policy(tmp_path)


def test_a_regression_ignores_the_noise(point_run: Path) -> None:
    policy, obs = Policy(regression(load(point_run))), torch.zeros(2, 2, 4)
    chunk = policy.predict_chunk(obs, 0)
    torch.testing.assert_close(chunk[0], chunk[1])
    torch.testing.assert_close(policy.predict_chunk(obs, 7), chunk)
