"""Schedules of a run that is not as long as its recipe."""

from dataclasses import replace

from fewstep.recipes.config import RunConfig

WARMUP_SHARE = 0.05
"""Largest share of such a run that its warm-up takes."""


def fitted(config: RunConfig, published: RunConfig | None) -> RunConfig:
    """The run with a warm-up of at most 5 % of it, by images or by seconds, unless its recipe was published as it is.

    published: the recipe of that name, None for a recipe of the user's own. A full run of a published recipe keeps the
    warm-up that its figures were measured with, and a warm-up that was set by hand stays. Averages need no fitting: a
    power function's window is a share of the run, a constant one's is held to 11 % of the steps so far (`ema_ramp`).
    """
    optimizer, training = config.optimizer, config.training
    if optimizer.warmup_share or not optimizer.warmup_images:
        return config
    if published is not None:
        by_hand = optimizer.warmup_images != published.optimizer.warmup_images
        whole = training.images >= published.training.images and training.seconds in (0, published.training.seconds)
        if by_hand or whole:
            return config
    elif not training.seconds and optimizer.warmup_images <= WARMUP_SHARE * training.images:
        return config
    return replace(config, optimizer=replace(optimizer, warmup_share=WARMUP_SHARE))
