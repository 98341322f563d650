"""What each role asks a cluster for: the one place of resource names and amounts.

Apart from `placement.py`, which hands them to Ray, so that they can be read without importing torch or an engine: the
preflight (`plan.py`) answers in seconds, and the configs in `cluster/` are held against them by a test.
"""

from typing import Literal

from rlhf_ray.config import Config, ResourcesConfig

RoleName = Literal["generator", "scorer", "learner"]
Amounts = dict[str, float]
"""How much of each of Ray's resources: `{"CPU": 1.0, "GPU": 0.5}`."""
SEATS: dict[RoleName, str] = {"generator": "rlhf_generator", "scorer": "rlhf_scorer", "learner": "rlhf_learner"}
"""Custom resources: what the nodes of a group in `cluster/` declare, and what a pinned role asks for."""
SERVING_SEAT = "rlhf_serving"
"""The same for the group that answers over HTTP."""


def needs(resources: ResourcesConfig, role: RoleName) -> Amounts:
    """What one actor of a role asks for."""
    gpus = {
        "generator": resources.generator_gpus,
        "scorer": resources.scorer_gpus,
        "learner": resources.learner_gpus,
    }
    seat = {SEATS[role]: 1.0} if resources.pin_roles else {}
    return {"CPU": 1.0, "GPU": gpus[role], **seat}


def head_count(config: Config) -> dict[RoleName, int]:
    """How many actors of each role are alive at once, at most; a supervised fit sits where the learner will."""
    return {
        "generator": config.rollout.generators,
        "scorer": config.resources.scorers,
        "learner": config.resources.learner_ranks,
    }
