"""Where roles run: the one file that tells Ray their resources (counted in `seats.py`), environments and restart rules.

| role      | CPUs | GPUs                       | after a death                                                 |
|-----------|------|----------------------------|---------------------------------------------------------------|
| generator | 1    | `resources.generator_gpus` | its group asks for another and hands its work on (`fleet.py`) |
| scorer    | 1    | `resources.scorer_gpus`    | the run stops, the same command resumes it                    |
| learner   | 1    | `resources.learner_gpus`   | the same, of any of its ranks                                 |

A CPU here is a seat, not a core: in a synchronous step one role works at a time and has all threads to itself.
With `resources.pin_roles` a role asks for a seat of its own name besides, which only the nodes of its group have.
"""

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import ray
import torch

from rlhf_ray.config import Config
from rlhf_ray.config.rewards import RewardsConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.rewards.combined import CombinedRewards, make_sources, read_keys
from rlhf_ray.roles.actors import GeneratorActor, LearnerActor, ScorerActor
from rlhf_ray.roles.calls import gather, stream
from rlhf_ray.roles.generator import Engine
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.groups import Group, LearnerGroup, ScorerGroup
from rlhf_ray.roles.joining import join
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.ranks import Meeting, as_rank
from rlhf_ray.roles.seats import SEATS, RoleName, head_count, needs
from rlhf_ray.roles.task import with_lines
from rlhf_ray.roles.vllm_engine import VllmEngine

AnyGroup = Group | GeneratorGroup
Say = Callable[[str], None]
SAID_EVERY_S = 20.0
"""While roles start."""
_G = TypeVar("_G", bound=AnyGroup)


class Placement:
    """A Ray cluster with this run's actors on it. Use as a context manager: leaving it ends them."""

    def __init__(self, config: Config, *, started: bool) -> None:
        self.config = config
        self.started = started
        """Whether Ray itself is ours to stop."""
        self.cores = _usable_cores(local=started)
        self.threads = threads_for(config, self.cores)
        self._groups: list[AnyGroup] = []

    def start_generators(
        self,
        model: Path,
        *,
        weights_step: int | None = None,
        make_engine: Callable[[], Engine] | None = None,
        say: Say = print,
    ) -> GeneratorGroup:
        """`rollout.generators` engines on a policy folder; with a `weights_step` they may sample from it at once.

        Returns before they are ready, as every `start_` method does: start all, then `wait_ready`. All are asked for
        now, so that an autoscaler sees what is wanted, though the run may start with fewer. Who comes and goes later
        is told by `say`.
        """
        resources = self.config.resources
        make_engine = make_engine or engine_for(self.config, model)
        remote = ray.remote(GeneratorActor).options(**self.options("generator"))
        return self._add(
            GeneratorGroup(
                lambda name: remote.remote(make_engine, name=name, weights_step=weights_step),
                wanted=self.config.rollout.generators,
                minimum=self.config.rollout.min_generators,
                deadline_s=resources.call_deadline_s,
                start_deadline_s=resources.start_deadline_s,
                say=say,
            )
        )

    def start_scorers(
        self,
        model: Path,
        rewards: RewardsConfig | None = None,
        *,
        load: Callable[[], CombinedRewards] | None = None,
    ) -> ScorerGroup:
        """`resources.scorers` actors, each with all sources of `rewards`; by default with the folder's model alone.

        `model` is what `rewards` means by the run's own reward model.
        """
        rewards = rewards or RewardsConfig()
        load = load or partial(make_sources, rewards, model, read_keys(rewards))
        names = [f"scorer-{i}" for i in range(self.config.resources.scorers)]
        remote = ray.remote(ScorerActor).options(**self.options("scorer"))
        actors = {name: remote.remote(load) for name in names}
        return self._add(ScorerGroup(actors, deadline_s=self.config.resources.call_deadline_s))

    def start_learner(self, make_learner: Callable[..., Learner]) -> LearnerGroup:
        """The learner that `make_learner(ranks=...)` makes in each rank, such as a partial `Learner.from_folder`."""
        resources, count = self.config.resources, self.config.resources.learner_ranks
        remote = ray.remote(LearnerActor).options(**self.options("learner"))
        names = [f"learner-{index}" for index in range(count)] if count > 1 else ["learner"]
        actors = {name: remote.remote(index, count) for index, name in enumerate(names)}
        where = actors[names[0]].meeting_point.remote() if count > 1 else None
        starting = {
            name: rank.make.remote(make_learner, where, resources.start_deadline_s) for name, rank in actors.items()
        }
        return self._add(LearnerGroup(actors, deadline_s=resources.call_deadline_s, starting=starting))

    def wait_ready(self, *, say: Say | None = None) -> None:
        """Returns once every actor started so far has its model, of generators once enough have; side by side.

        `say` hears who starts, with what, and how long it takes. Raises the first one's own error, or
        `DeadlineExceeded` after `resources.start_deadline_s`.
        """
        with self._telling(say) if say else contextlib.nullcontext():
            waiting = [group for group in self._groups if isinstance(group, Group) and not group.nodes]
            calls = {name: ref for group in waiting for name, ref in group.ready().items()}
            nodes = gather(calls, deadline_s=self.config.resources.start_deadline_s, doing="starting")
            for group in waiting:
                group.nodes = {name: nodes[name] for name in group.actors}
            for generators in self._groups:
                if isinstance(generators, GeneratorGroup):
                    generators.fleet.wait_ready()

    def run_task(
        self,
        function: Callable[..., Any],
        *args: Any,
        doing: str,
        deadline_s: float,
        role: RoleName = "learner",
        ranks: int = 1,
        on_line: Callable[[str], None] = print,
        **kwargs: Any,
    ) -> Any:
        """`function(*args, **kwargs)` in a process of its own with a role's resources.

        Each line that it prints goes to `on_line` at once. With several `ranks` in as many processes, which make one
        torch process group; what the first one returns counts.
        """
        name, options = function.__name__, self.options(role, actor=False)
        if ranks == 1:
            remote = ray.remote(with_lines).options(**options, num_returns="streaming")
            tasks = {name: remote.remote(function, args, kwargs)}
            return stream(tasks, deadline_s=deadline_s, doing=doing, on_line=on_line)
        # a process that was a rank once is one for ever, as accelerate remembers it: none does anything after it
        remote = ray.remote(max_calls=1)(with_lines).options(**options, num_returns="streaming")
        meeting = Meeting(ray.util.get_node_ip_address())
        told = (ranks, meeting.point, self.config.resources.call_deadline_s)
        tasks = {
            f"{name}-{index}": remote.remote(as_rank, (function, index, *told, *args), kwargs) for index in range(ranks)
        }
        return stream(tasks, deadline_s=deadline_s, doing=doing, on_line=on_line)

    def options(self, role: RoleName, *, actor: bool = True) -> dict[str, Any]:
        """What Ray is told about a role."""
        restarts: dict[str, Any] = {"max_restarts": 0, "max_task_retries": 0} if actor else {"max_retries": 0}
        asked = needs(self.config.resources, role)
        return {
            "num_cpus": asked.pop("CPU"),
            "num_gpus": asked.pop("GPU"),
            "resources": asked,
            "runtime_env": {"env_vars": _environment(self.threads[role])},
            **restarts,
        }

    def stop(self, group: AnyGroup) -> None:
        """Ends a group's actors and frees what they hold."""
        self._groups.remove(group)
        group.close()

    def stop_actors(self) -> None:
        """Ends all of this run's actors."""
        for group in list(self._groups):
            self.stop(group)

    def shutdown(self) -> None:
        """Ends this run's actors, and Ray where it was started for the run."""
        self.stop_actors()
        ray.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    def _add(self, group: _G) -> _G:
        self._groups.append(group)
        return group

    @contextlib.contextmanager
    def _telling(self, say: Say) -> Iterator[None]:
        """Says who starts, every now and then who is not there yet, and how long it took."""
        if not (names := self._not_ready()):
            yield
            return
        began, over = time.monotonic(), threading.Event()
        say(f"starting {', '.join(names)}: {self._share()}")

        def remind() -> None:
            while not over.wait(SAID_EVERY_S):
                say(f"still starting after {time.monotonic() - began:.0f} s: {', '.join(self._not_ready())}")

        reminder = threading.Thread(target=remind, name="starting", daemon=True)
        reminder.start()
        try:
            yield
        finally:
            over.set()
            reminder.join()
        say(f"ready after {time.monotonic() - began:.1f} s")

    def _not_ready(self) -> list[str]:
        return [name for group in self._groups for name in list(group.actors) if name not in group.nodes]

    def _share(self) -> str:
        """What each role has of the machine."""
        threads = ", ".join(f"{count} for {role}" for role, count in self.threads.items())
        shares = {role: needs(self.config.resources, role)["GPU"] for role in head_count(self.config)}
        gpus = ", ".join(f"{share:g} for each {role}" for role, share in shares.items() if share)
        return f"threads: {threads} ({self.cores} cores); " + (f"GPUs: {gpus}" if gpus else "no GPU")


def engine_for(config: Config, model: Path) -> Callable[[], Engine]:
    """What makes a vLLM engine as the config says, in whatever process calls it."""
    resources = config.resources
    return partial(
        VllmEngine,
        model,
        context=config.model.context,
        kv_cache_mib=resources.kv_cache_mib,
        compile=resources.compile_engine,
        dtype=resources.engine_dtype,
        quantisation=None if resources.engine_quantisation == "none" else resources.engine_quantisation,
        tensor_parallel=resources.engine_tensor_parallel,
        pipeline_parallel=resources.engine_pipeline_parallel,
        can_sleep=resources.engine_sleep,
        seed=config.seed,
    )


def start_ray(config: Config) -> Placement:
    """A local Ray for this run alone, or the cluster at `resources.address`.

    Raises `ConfigError` where this machine lacks what the roles ask for, `InfrastructureError` where no cluster
    answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if config.resources.address is not None:
        join(config.resources.address)
        return Placement(config, started=False)
    _check_gpus(config)
    seats = sum(head_count(config).values()) + 1  # and a supervised fit
    ray.init(
        address="local",
        num_cpus=max(seats, _cores()),
        resources=_seats_here(config),
        include_dashboard=False,
        log_to_driver=False,  # vLLM's chatter stays in Ray's log folder; progress comes by `run_task`
        logging_level=logging.ERROR,
    )
    return Placement(config, started=True)


def _check_gpus(config: Config) -> None:
    wanted = sum(count * needs(config.resources, role)["GPU"] for role, count in head_count(config).items())
    there = torch.cuda.device_count()
    if wanted > there:
        raise ConfigError(
            f"the roles ask for {wanted:g} GPUs (resources.generator_gpus and its like) and this machine has {there}; "
            "set them to 0 to run on CPU, or resources.address to a cluster that has them"
        )


def _seats_here(config: Config) -> dict[str, float]:
    """A seat for each pinned role; this machine is every group at once."""
    if not config.resources.pin_roles:
        return {}
    return {SEATS[role]: float(count + 1) for role, count in head_count(config).items()}


def _environment(threads: int) -> dict[str, str]:
    """Read when a role's process starts; OpenMP cannot be told later."""
    return {
        "OMP_NUM_THREADS": str(threads),
        # OpenMP's default is to spin for long while threads wait for each other: as fast as can be on an idle machine,
        # 5 to 25 times as slow beside one other busy process. Spinning briefly (300 and 3000 were measured, this lies
        # between) was as fast on an idle machine; not spinning at all costs small batches up to half their speed.
        "GOMP_SPINCOUNT": "2000",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }


def threads_for(config: Config, cores: int) -> dict[RoleName, int]:
    """Threads of each role: all cores where one works at a time, half where generators and learner do.

    With more threads than cores OpenMP's are in each other's way: two busy roles with all cores each were thirty times
    slower than with half of them.
    """
    share = config.resources.threads or (max(1, cores // 2) if config.rollout.max_staleness else cores)
    return dict.fromkeys(SEATS, share)


def _usable_cores(*, local: bool) -> int:
    """Cores that every role finds where it runs."""
    if local:
        return _cores()
    nodes = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    return max(1, min((cpus for cpus in nodes if cpus), default=1))


def _cores() -> int:
    """Cores of this machine that the process may use: fewer than there are in a container with a quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max": no quota
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    return cores
