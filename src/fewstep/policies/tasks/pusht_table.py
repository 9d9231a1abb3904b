"""The table of PushT: gym-pusht's physics, and a way to set its state that does what it says."""

import math
from typing import Any

import numpy as np

from fewstep.utils.errors import MissingExtraError
from fewstep.utils.extras import installing

SIZE = 512.0
"""Side of the square in which circle and block move; positions are in pixels of it, y downwards."""
GOAL_POSE = np.array([256.0, 256.0, math.pi / 4])
"""Where the block belongs: x, y, angle."""


def make_table() -> Any:
    """gym-pusht's environment."""
    try:
        from gym_pusht.envs.pusht import PushTEnv
    except ImportError as error:
        raise MissingExtraError(f"task pusht needs gym-pusht: {installing('policy')} ({error})") from error
    return PushTEnv(obs_type="state", render_mode="rgb_array")


def place(table: Any, state: Any) -> None:
    """Put circle and block where `state` (5,) says, at rest.

    The angle comes first: it turns the block about its centre of mass, which moves the position that it names.
    """
    table.agent.position, table.agent.velocity = tuple(map(float, state[:2])), (0.0, 0.0)
    table.block.angle = float(state[4])
    table.block.position = tuple(map(float, state[2:4]))
    table.block.velocity, table.block.angular_velocity = (0.0, 0.0), 0.0
    for body in (table.agent, table.block):
        table.space.reindex_shapes_for_body(body)
