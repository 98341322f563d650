"""Where roles run: the one file that knows Ray's resources, environments and restart rules.

| role      | CPUs | GPUs                       | after a death                                |
|-----------|------|----------------------------|----------------------------------------------|
| generator | 1    | `resources.generator_gpus` | the run stops, the same command resumes it   |
| scorer    | 1    | `resources.scorer_gpus`    | the same                                     |
| learner   | 1    | `resources.learner_gpus`   | the same                                     |

A CPU here is a seat, not a core: in a synchronous step one role works at a time and has all threads to itself.
"""

import contextlib
import logging
import os
import queue
import socket
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import ray

from rlhf_ray.config import Config, ResourcesConfig
from rlhf_ray.errors import ConfigError, InfrastructureError
from rlhf_ray.models.reward import load_reward_model
from rlhf_ray.roles.calls import Done, Line, gather, stream
from rlhf_ray.roles.generator import Engine, Generator
from rlhf_ray.roles.groups import GeneratorGroup, Group, LearnerGroup, ScorerGroup
from rlhf_ray.roles.scorer import Scorer, Scoring
from rlhf_ray.roles.vllm_engine import VllmEngine

RoleName = Literal["generator", "scorer", "learner"]
CONNECT_S = 10


class _Resident:
    """What every actor can say of itself."""

    def whereabouts(self) -> str:
        """Node and process; the first answer also says that the actor is ready."""
        return f"{socket.gethostname()} ({ray.util.get_node_ip_address()}, pid {os.getpid()})"


class GeneratorActor(_Resident, Generator):
    """A generator that makes its engine where it runs."""

    def __init__(self, make_engine: Callable[[], Engine], *, name: str, weights_step: int | None) -> None:
        super().__init__(make_engine(), name=name, weights_step=weights_step)


class ScorerActor(_Resident, Scorer):
    """A scorer that loads its reward model where it runs."""

    def __init__(self, load: Callable[[], Scoring], *, name: str) -> None:
        super().__init__(load(), name=name)
