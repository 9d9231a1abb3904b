"""Robot policies: observations in, chunks of actions out, on the same flow maps as images."""

from fewstep.policies.policy import Policy, load_policy
from fewstep.policies.rollout import Rollout, record, roll_out, wilson
from fewstep.policies.running import Episode
from fewstep.policies.simulation import Expert, Outcome, Simulation, Task
from fewstep.policies.tasks.registry import TASKS, find_task

__all__ = [
    "TASKS",
    "Episode",
    "Expert",
    "Outcome",
    "Policy",
    "Rollout",
    "Simulation",
    "Task",
    "find_task",
    "load_policy",
    "record",
    "roll_out",
    "wilson",
]
