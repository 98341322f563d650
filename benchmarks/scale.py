"""The real loop on a cluster that is not there: how far does it go, who waits, and when is the loop itself the limit?

    python benchmarks/scale.py                  # 8B and 70B on 8 to 512 GPUs; draws docs/scale-8B.svg, -70B.svg
    python benchmarks/scale.py --predict        # the published runs of `PEERS`, predicted

What runs is this project's own page, group, dispatch and look-ahead. Simulated are engines, learner, scorers and the
clock: a call takes the seconds that a model of the hardware says, and nothing is waited for in earnest.

The model of an engine is a roofline: a decoding step reads all weights and every sequence's cache once (bandwidth), or
computes 2 FLOP a parameter and sequence, whichever takes longer. The learner computes 6 FLOP a parameter and token, and
2 for each pass without a gradient. Inputs, none of them fitted to what is predicted:

- H100 SXM: 3.35 TB/s and 989 TFLOP/s dense bfloat16 (NVIDIA's data sheet).
- An engine reaches 0.77 of the bandwidth: Llama-3.1-8B in vLLM 0.23 on an A100, 75 tokens/s at batch 1
  (johnmusgrave.com/p/vllm-throughput-latency-sweep-on). Of the arithmetic half is assumed.
- A learner reaches 0.40 of the arithmetic: Llama 3 on 8,000 to 16,000 H100s, 38% to 43% ("The Llama 3 Herd of Models",
  arXiv 2407.21783, table 4).
- Each tensor-parallel layer adds two all-reduces of 15 microseconds (assumed).
- Weights are handed over at 20 GB/s (assumed: a 400 Gbit/s network at less than half its rate), and verified in 1 s.
- The driver's cost of a rollout and of a call are those that `loop.py` measures on two cores.

Lengths are lognormal around the published mean, cut at the published maximum.
"""

import argparse
import math
import statistics
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from typing import Any
from unittest.mock import patch

from plots import save

from rlhf_ray.config import load_config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.roles.calls import gather
from rlhf_ray.roles.generator import Turn
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.training.charts import Series, line_chart
from rlhf_ray.training.ppo import PPO, Roles
from rlhf_ray.types import Exchange, GenerationRequest, Message, Prompt, Rollout, Scored, Scores, Span

BANDWIDTH, ARITHMETIC = 3.35e12, 989e12
ENGINE_BANDWIDTH, ENGINE_ARITHMETIC, LEARNER_ARITHMETIC = 0.77, 0.5, 0.40
ALL_REDUCE_S, NETWORK, VERIFY_S = 15e-6, 20e9, 1.0
SEQUENCES = 256
"""Most that one engine decodes at once."""
DRIVER_PER_ROLLOUT_S, DRIVER_PER_CALL_S = 0.21e-3, 0.8e-3
SPREAD = 0.8
"""Of the logarithm of lengths."""
SIZES = (8, 16, 32, 64, 128, 256, 512)
STALENESS = (0, 1, 4)
STEPS, WARM_UP = 4, 6
LATE_S = 1e5


@dataclass(frozen=True)
class Model:
    """What a model weighs."""

    name: str
    parameters: float
    layers: int
    cache: float
    """Bytes of keys and values a token."""
    tensor_parallel: int
    """GPUs of an engine."""
    passes: int = 2
    """Of the learner without a gradient: the policy's and the reference's log-probs."""


MODELS = {
    "8B": Model("8B", 8.0e9, 32, 2 * 2 * 8 * 128 * 32, 1),
    "70B": Model("70B", 70.6e9, 80, 2 * 2 * 8 * 128 * 80, 4),
    "32B": Model("32B", 32.8e9, 64, 2 * 2 * 8 * 128 * 64, 4),
}


@dataclass(frozen=True)
class Job:
    """A step on a cluster."""

    model: Model
    gpus: int
    rollouts: int = 2048
    mean: int = 1060
    longest: int = 4096
    staleness: int = 0
    together: bool = False
    """Whether engines and learner take turns on all GPUs, or each has half of them."""

    @property
    def engines(self) -> int:
        """Generators."""
        return max(1, (self.gpus if self.together else self.gpus // 2) // self.model.tensor_parallel)

    @property
    def learner_gpus(self) -> int:
        """Of the learner."""
        return self.gpus if self.together else self.gpus // 2


PEERS = (
    ("NeMo RL 0.4, Llama-3.1-8B, on-policy", Job(MODELS["8B"], 16, together=True)),
    ("NeMo RL 0.4, Llama-3.1-8B, one step off", Job(MODELS["8B"], 16, mean=1129, staleness=1)),
    ("NeMo RL 0.4, Qwen3-32B, on-policy", Job(MODELS["32B"], 32, mean=3206, together=True)),
    ("NeMo RL 0.4, Qwen3-32B, one step off", Job(MODELS["32B"], 64, mean=3207, staleness=1)),
)
"""Published runs on H100s (docs/about/performance-summary.md of NVIDIA-NeMo/RL), 2,048 rollouts a step."""


class World:
    """A clock that jumps, and what the modules under test take for `ray` and for `time`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.bill: float | None = None
        """Seconds that a call on another thread is charged; None: this thread waits itself."""
        self.calls = 0

    def monotonic(self) -> float:
        return self.now

    def spend(self, seconds: float) -> None:
        """What the learner or a scorer takes."""
        if self.bill is None:
            self.now += seconds
        else:
            self.bill += seconds

    def wait(self, refs: Sequence["Ref"], timeout: float | None = None) -> tuple[list["Ref"], list["Ref"]]:
        assert timeout is not None
        first = min(refs, key=lambda ref: ref.ends)
        if first.ends > self.now + timeout:
            self.now += timeout
            return [], list(refs)
        self.now = max(self.now, first.ends)
        return [first], [ref for ref in refs if ref is not first]

    def get(self, ref: "Ref") -> Any:
        return ref.value

    def cancel(self, ref: "Ref") -> None:
        """What is asked is done."""

    def kill(self, actor: "Engine") -> None:
        """Nobody is killed here."""


@dataclass(frozen=True, eq=False)
class Ref:
    """A call under way: what it comes to, and when."""

    ends: float
    value: Any


class Executor:
    """A thread beside the driver: what is given to it is charged, one after the other."""

    def __init__(self, world: World) -> None:
        self.world, self.free = world, 0.0

    def __enter__(self) -> "Executor":
        return self

    def __exit__(self, *_: object) -> None:
        """Has nothing to give up."""

    def submit(self, work: Callable[..., Any], *arguments: Any) -> "Future":
        world = self.world
        world.bill = 0.0
        value = work(*arguments)
        self.free = max(self.free, world.now) + world.bill
        world.bill = None
        return Future(world, value, self.free)


class Future:
    """What comes of it, and when."""

    def __init__(self, world: World, value: Any, ready: float) -> None:
        self.world, self.value, self.ready = world, value, ready

    def done(self) -> bool:
        return self.world.now >= self.ready

    def result(self) -> Any:
        self.world.now = max(self.world.now, self.ready)
        return self.value


class Engine:
    """An actor's handle: an engine with continuous batching, whose decoding steps take what the roofline says."""

    def __init__(self, world: World, job: Job, name: str) -> None:
        self.world, self.job, self.name = world, job, name
        self.free, self.busy, self.weights_step = 0.0, 0.0, 0
        self.running: dict[str, list[Any]] = {}
        """By rollout: its request, tokens left, tokens so far, and the weights step that it began with."""
        self.queue: deque[GenerationRequest] = deque()
        for method in ("whereabouts", "generate", "refit", "release", "ping"):
            setattr(self, method, Remote(self, getattr(self, f"_{method}")))

    def call(self, method: Callable[..., tuple[float, Any]], *arguments: Any, **keywords: Any) -> Ref:
        """Does it once the calls before it are done."""
        self.world.calls += 1
        begin = max(self.world.now, self.free)
        took, value = method(*arguments, **keywords)
        self.free = begin + took
        return Ref(self.free, value)

    def _whereabouts(self) -> tuple[float, str]:
        return 0.0, "a node"

    def _ping(self) -> tuple[float, int]:
        return 0.0, self.weights_step

    def _refit(self, weights_step: int) -> tuple[float, None]:
        self.weights_step = weights_step
        return self.job.model.parameters * 2 / NETWORK + VERIFY_S, None

    def _release(self, weights_step: int) -> tuple[float, None]:
        return 0.0, None

    def _generate(
        self, requests: Sequence[GenerationRequest], *, weights_step: int | None, for_s: float
    ) -> tuple[float, Turn]:
        self.queue.extend(requests)
        took, ended = 0.0, []
        while (self.queue or self.running) and took < for_s:
            while self.queue and len(self.running) < SEQUENCES:
                request = self.queue.popleft()
                self.running[request.rollout_id] = [request, length_of(request, self.job), 0, self.weights_step]
                took += len(request.prompt_ids) * 2 * self.job.model.parameters / self._arithmetic
            latency = self._latency()
            steps = min(left for _, left, _, _ in self.running.values())
            steps = min(steps, max(1, math.ceil((for_s - took) / latency))) if math.isfinite(for_s) else steps
            took += steps * latency
            for id, sequence in list(self.running.items()):
                sequence[1] -= steps
                sequence[2] += steps
                if not sequence[1]:
                    del self.running[id]
                    ended.append(_rollout(sequence, self.weights_step))
        self.busy += took
        return took, Turn(ended, len(self.running) + len(self.queue))

    @property
    def _arithmetic(self) -> float:
        return ARITHMETIC * ENGINE_ARITHMETIC * self.job.model.tensor_parallel

    def _latency(self) -> float:
        """Seconds of a decoding step."""
        model, batch = self.job.model, len(self.running)
        tokens = sum(len(request.prompt_ids) + done for request, _, done, _ in self.running.values())
        read = (2 * model.parameters + tokens * model.cache) / (BANDWIDTH * ENGINE_BANDWIDTH * model.tensor_parallel)
        computed = 2 * model.parameters * batch / self._arithmetic
        together = 2 * model.layers * ALL_REDUCE_S if model.tensor_parallel > 1 else 0.0
        return max(read, computed) + together


class Remote:
    """`actor.method.remote`."""

    def __init__(self, engine: Engine, method: Callable[..., Any]) -> None:
        self.remote = lambda *arguments, **keywords: engine.call(method, *arguments, **keywords)


class Cluster:
    """Learner, scorers and hand-off of a job."""

    def __init__(self, world: World, job: Job) -> None:
        self.world, self.job, self.busy = world, job, 0.0
        self.generators = GeneratorGroup(
            lambda name: Engine(world, job, name),
            wanted=job.engines,
            minimum=None,
            deadline_s=LATE_S,
            start_deadline_s=LATE_S,
        )
        self.generators.fleet.wait_ready()
        self.generators.release(0)

    def ask(self, exchanges: Sequence[Exchange]) -> Scores:
        """A rule's rewards, which cost nothing beside the rest."""
        rewards: list[float | None] = [1.0] * len(exchanges)
        return Scores(rewards, {"rule": rewards}, {}, {})

    def prepare(self, sampled: Scored, greedy: Scored | None = None) -> dict[str, float]:
        self.tokens = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in sampled.rollouts)
        self._learner(2 * self.job.model.passes)
        return {}

    def update(self) -> dict[str, float]:
        self._learner(6)
        return {}

    def publish(self, weights_step: int) -> dict[str, float]:
        """Engines take new weights between two turns; each a copy over its own link."""
        group = self.generators
        gather(
            {name: actor.refit.remote(weights_step) for name, actor in group.fleet.actors.items()},
            deadline_s=LATE_S,
            doing="loading weights",
        )
        group.release(weights_step)
        return {}

    def _learner(self, per_parameter: int) -> None:
        took = per_parameter * self.job.model.parameters * self.tokens
        took /= ARITHMETIC * LEARNER_ARITHMETIC * self.job.learner_gpus
        self.busy += took
        self.world.spend(took)


@dataclass(frozen=True)
class Outcome:
    """What a job's steps came to, in the mean."""

    seconds: float
    tokens: float
    """A second, all GPUs together."""
    engines_idle: float
    learner_idle: float
    staleness: float
    driver: float
    """Share of the step that the driver's own work takes, on one core."""


def run(job: Job) -> Outcome:
    """Some steps of the real loop."""
    world = World()
    with simulated(world):
        cluster = Cluster(world, job)
        config = load_config(
            None,
            [
                "run.id=scale", f"rollout.prompts={job.rollouts}", f"rollout.max_tokens={job.longest}",
                f"rollout.max_staleness={job.staleness}", "ppo.steps=100", "ppo.kl.limit=1e9",
                f"model.context={2 * job.longest}",
            ],
        )  # fmt: skip
        prompts = [Prompt(f"p{i}", (Message("user", "x" * 128),), group=f"p{i}") for i in range(job.rollouts)]
        ppo = PPO(
            Roles(cluster.generators, cluster, cluster, cluster),
            prompts=PromptStream(prompts, seed=0),
            tokenizer=Letters(),
            config=config,
        )
        for step in range(WARM_UP):
            ppo.step(step)
        engines = list(cluster.generators.actors.values())
        start, calls, learnt, sampled = world.now, world.calls, cluster.busy, sum(engine.busy for engine in engines)
        taken = [ppo.step(WARM_UP + step) for step in range(STEPS)]
        took = world.now - start
        tokens = sum(len(r.prompt_ids) + len(r.response_ids) for step in taken for r in step.rollouts)
        ppo.close()  # in here: what is under way is called off by the world's own calls
        driver = STEPS * job.rollouts * DRIVER_PER_ROLLOUT_S + (world.calls - calls) * DRIVER_PER_CALL_S
        return Outcome(
            took / STEPS,
            tokens / took,
            1 - (sum(engine.busy for engine in engines) - sampled) / (took * len(engines)),
            1 - (cluster.busy - learnt) / took,
            statistics.fmean(step.metrics["rollout/staleness_mean"] for step in taken),
            driver / took,
        )


@contextmanager
def simulated(world: World) -> Iterator[None]:
    """The loop's modules with this world's clock and calls."""
    roles, training = "rlhf_ray.roles", "rlhf_ray.training"
    with (
        patch(f"{roles}.calls.ray", world),
        patch(f"{roles}.fleet.ray", world),
        patch(f"{roles}.calls.time", world),
        patch(f"{roles}.fleet.time", world),
        patch(f"{roles}.generators.time", world),
        patch(f"{training}.ahead.time", world),
        patch(f"{training}.ppo.time", world),
        patch(f"{training}.ahead.ThreadPoolExecutor", lambda *_, **__: Executor(world)),
    ):
        yield


class Letters:
    """A tokenizer that has nothing to say."""

    model_max_length = 1 << 20
    eos_token_id = 0
    all_special_tokens: tuple[str, ...] = ()

    def apply_chat_template(self, turns: Sequence[Mapping[str, str]], **_: object) -> str:
        return turns[-1]["content"]

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [1] * len(text)}

    def decode(self, ids: Sequence[int], **_: object) -> str:
        return ""


def ahead(staleness: int) -> str:
    """In words."""
    return f"{staleness} ahead" if staleness else "in turn"


def length_of(request: GenerationRequest, job: Job) -> int:
    """Tokens of a response, by its seed."""
    drawn = Random(request.seed).lognormvariate(math.log(job.mean) - SPREAD**2 / 2, SPREAD)
    return max(1, min(job.longest, round(drawn)))


def _rollout(sequence: Sequence[Any], weights_step: int) -> Rollout:
    request, _, length, first = sequence
    swaps = () if first == weights_step else (Span(1, weights_step),)
    tokens: Any = range(length)
    return Rollout(request.rollout_id, request.prompt_id, request.prompt_ids, tokens, tokens, first, "stop", swaps)


def main() -> int:
    """Prints tables, and draws one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--predict", action="store_true")
    parser.add_argument("--most", type=int, default=max(SIZES), help="GPUs")
    options = parser.parse_args()
    if options.predict:
        for name, job in PEERS:
            print(f"{name}: {job.gpus} GPUs, {run(job).seconds:.1f} s a step", flush=True)
        return 0
    print("| model | GPUs | engines | steps | s a step | tokens/s | engines idle | learner idle | staleness | driver |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in ("8B", "70B"):
        curves = [Series(ahead(staleness), rows_of(name, staleness, options.most)) for staleness in STALENESS]
        chart = line_chart(curves, label=f"{name}: tokens a second", x_label="GPUs", from_zero=True)
        print(save(chart, f"scale-{name}", legend=tuple(curve.label for curve in curves)))
    return 0


def rows_of(name: str, staleness: int, most: int) -> list[tuple[float, float]]:
    """Prints a row for each number of GPUs; returns them with their tokens a second."""
    points = []
    for gpus in SIZES:
        job = Job(MODELS[name], gpus, staleness=staleness)
        if gpus > most or gpus < 2 * job.model.tensor_parallel:
            continue
        found = run(job)
        points.append((float(gpus), found.tokens))
        cells = [
            name, gpus, job.engines, ahead(staleness), f"{found.seconds:.1f}", f"{found.tokens:,.0f}",
            f"{found.engines_idle:.0%}", f"{found.learner_idle:.0%}", f"{found.staleness:.2f}", f"{found.driver:.1%}",
        ]  # fmt: skip
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)
    return points


if __name__ == "__main__":
    raise SystemExit(main())
