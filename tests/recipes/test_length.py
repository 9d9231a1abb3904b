"""Schedules of runs that are shorter than their recipes."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fewstep.recipes import RECIPES, fitted, recipe
from fewstep.recipes.config import OptimizerConfig, RunConfig, TrainingConfig
from fewstep.training.ema import EMA
from fewstep.training.optimizers import risen, schedule


@pytest.mark.parametrize("name", RECIPES)
def test_a_published_recipe_keeps_its_schedule(name: str) -> None:
    assert fitted(recipe(name), recipe(name)) == recipe(name)


def timed(config: RunConfig, images: int, seconds: float = 0.0) -> RunConfig:
    return replace(config, training=replace(config.training, images=images, seconds=seconds))


@given(images=st.integers(1, 10**7), share=st.floats(0.05, 1.0))
def test_a_shortened_run_has_risen_after_a_twentieth(images: int, share: float) -> None:
    """By images, whatever the recipe's warm-up; before it, the rate rises in proportion."""
    whole = recipe("digits")
    short = fitted(timed(whole, min(images, whole.training.images - 1)), whole)
    optimizer, length = short.optimizer, short.training.images
    assert risen(optimizer, int(share * length), share) == 1
    assert risen(optimizer, 0, share / 40) == pytest.approx(min(1, share / 2))


def test_a_run_that_ends_by_seconds_rises_by_seconds() -> None:
    whole = recipe("digits")
    short = fitted(timed(whole, whole.training.images, 60.0), whole)
    assert short.optimizer.warmup_share == 0.05
    assert [risen(short.optimizer, 256, seconds / 60) for seconds in (0.3, 1.5, 3, 30)] == pytest.approx(
        [0.1, 0.5, 1, 1]
    )


def test_what_was_set_by_hand_stays() -> None:
    whole = recipe("digits")
    by_hand = replace(timed(whole, 10_000), optimizer=replace(whole.optimizer, warmup_images=9_000))
    assert fitted(by_hand, whole) == by_hand
    unlimited = replace(timed(whole, 10_000), optimizer=replace(whole.optimizer, warmup_share=1.0))
    assert fitted(unlimited, whole) == unlimited


def test_a_recipe_of_one_s_own_is_limited_where_its_warm_up_is_long() -> None:
    own = RunConfig("own", training=TrainingConfig(images=100_000))
    assert fitted(own, None).optimizer.warmup_share == 0.05
    assert fitted(timed(own, 200_000), None) == timed(own, 200_000)  # 10,000 images are a twentieth of it
    assert fitted(fitted(own, None), None) == fitted(own, None)


@given(images=st.integers(1, 10**6), progress=st.floats(0, 1))
def test_without_a_share_the_warm_up_is_as_it_was(images: int, progress: float) -> None:
    config = OptimizerConfig(warmup_images=10_000)
    assert schedule(config, images, progress) == min(1.0, images / 10_000)


@given(steps=st.integers(1, 10**6))
def test_a_constant_average_follows_the_run_s_length(steps: int) -> None:
    """Its window 1/(1 - beta) is at most a ninth of the steps so far, and ten ninths of a step more."""
    ema = EMA.__new__(EMA)
    ema.decay, ema.gamma, ema.ramp = 0.99995, None, True
    assert 1 / (1 - ema.beta(steps)) <= (steps + 10) / 9 * (1 + 1e-9)
