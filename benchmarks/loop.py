"""What does the loop itself cost, where engines, scorers and learner answer at once?

    python benchmarks/loop.py                     # rollouts a second, the driver's time, its memory over 1,000 steps
    python benchmarks/loop.py --dispatcher        # handing requests out to 64 and 1,024 generators, without Ray

Real Ray actors and the real page: prompts through the chat template, requests, dispatch, calls, answers back to text,
scores, preparing and learning, with roles that have nothing to compute. 512 rollouts a step, prompts of some 16 tokens,
responses of 64; what handing weights over costs is `generator.py --handover`'s.
"""

import argparse
import os
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from workload import make_workload, words

from rlhf_ray.config import Config, load_config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.models.policy import load_tokenizer
from rlhf_ray.rewards.combined import CombinedRewards, Weighted
from rlhf_ray.rewards.model import ModelSource
from rlhf_ray.roles.dispatch import Dispatch
from rlhf_ray.roles.generator import Sampled, Turn
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.placement import start_ray
from rlhf_ray.training.ppo import PPO, Roles
from rlhf_ray.types import Exchange, GenerationRequest, Message, Prompt, Rollout, Sampling, Scored, Span

ROLLOUTS, PROMPT, RESPONSE = 512, 16, 64
WANTED_PER_S, WANTED_MS, WANTED_GROWTH_MIB = 2000, 0.3, 10
STEPS, LONG = 20, 1000


class InstantEngine:
    """Has its answers at once: all the same, of full length; longer ones never end."""

    def __init__(self) -> None:
        self.waiting: list[str] = []
        self.endless = False
        self.answer = Sampled(tuple(range(2, 2 + RESPONSE)), (-1.0,) * RESPONSE, "length", (Span(0, 0),))

    def add(self, id: str, prompt: Sequence[int], sampling: Sampling, seed: int) -> None:
        if sampling.max_tokens <= RESPONSE:
            self.waiting.append(id)
        else:
            self.endless = True

    def step(self) -> list[tuple[str, Sampled]]:
        ended, self.waiting = [(id, self.answer) for id in self.waiting], []
        return ended

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or self.endless

    def stamp(self, weights_step: int) -> None:
        """Has none."""


class InstantScorer:
    """A reward that costs nothing."""

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        return [1.0] * len(exchanges)


class InstantLearner:
    """Learns nothing."""

    def __init__(self, config: Config) -> None:
        self.config = config

    def prepare(self, sampled: Scored, greedy: Scored | None = None) -> Any:
        return SimpleNamespace(metrics={"objective/scores": sum(sampled.scores) / len(sampled.scores)})

    def update(self, batch: Any) -> dict[str, float]:
        return {"loss/policy_avg": 0.0}


class NoHandoff:
    """There are no weights."""

    def publish(self, weights_step: int) -> dict[str, float]:
        return {}


def main() -> int:
    """Prints figures; exits 1 where one is not what is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dispatcher", action="store_true")
    parser.add_argument("--steps", type=int, default=LONG, help="of the long run that memory is watched in")
    options = parser.parse_args()
    if options.dispatcher:
        return 0 if min(map(dispatcher, (64, 1024))) else 1
    return 0 if all([cost(1, STEPS, watched=False), cost(8, options.steps, watched=True)]) else 1


def cost(generators: int, steps: int, *, watched: bool) -> bool:
    """Rollouts a second, the driver's own time for each and for a turn, and with `watched` its memory on the way."""
    config = load_config(
        None,
        [
            "run.id=bench", f"rollout.generators={generators}", f"rollout.prompts={ROLLOUTS}", "model.context=512",
            f"rollout.max_tokens={RESPONSE}", "ppo.steps=1000000", "ppo.kl.limit=1e9", "resources.threads=1",
        ],
    )  # fmt: skip
    with loop(config) as ppo:
        ppo.step(0)
        seconds, driver, memory = [], [], []
        for step in range(1, steps + 1):
            start, own = time.perf_counter(), time.process_time()
            ppo.step(step)
            seconds.append(time.perf_counter() - start)
            driver.append(time.process_time() - own)
            memory.append(resident_mib())
        turn = seconds_of_a_turn(ppo.roles.generators)
    rate, own = ROLLOUTS / statistics.median(seconds), 1000 * statistics.median(driver) / ROLLOUTS
    print(
        f"{generators} generators: {rate:,.0f} rollouts/s (wanted: {WANTED_PER_S:,}), driver {own:.3f} ms a rollout "
        f"(wanted: {WANTED_MS}), {1000 * turn:.2f} ms a turn in which nothing ends",
        flush=True,
    )
    if not watched:
        return rate >= WANTED_PER_S and own <= WANTED_MS
    tenth = max(1, steps // 10)
    early, late = (statistics.median(memory[i : i + tenth]) for i in (tenth, steps - tenth))
    print(
        f"{steps} steps, {steps * ROLLOUTS:,} rollouts: driver's memory {early:.0f} MiB in the second tenth, "
        f"{late:.0f} MiB in the last (wanted: at most {WANTED_GROWTH_MIB} more)"
    )
    return rate >= WANTED_PER_S and own <= WANTED_MS and late - early <= WANTED_GROWTH_MIB


def seconds_of_a_turn(generators: GeneratorGroup, turns: int = 400) -> float:
    """The driver's processor time for a generator's turn that has nothing to show."""
    endless = Sampling(max_tokens=RESPONSE + 1)
    with generators.session(turn_s=0) as session:
        session.ask([GenerationRequest(f"t/0/p{i}/0", f"p{i}", (2,), seed=i) for i in range(64)], endless)
        session.turn()
        start = time.process_time()
        for _ in range(turns):
            session.turn()
        return (time.process_time() - start) / turns


@contextmanager
def loop(config: Config) -> Iterator[PPO]:
    """The page over real actors that have nothing to compute."""
    with tempfile.TemporaryDirectory() as folder, start_ray(config) as placement:
        base = make_workload(Path(folder), "1M", prompts=4 * ROLLOUTS) / "policy"
        tokenizer = load_tokenizer(base, context=config.model.context)
        draw = range(2, 2 + PROMPT)
        prompts = [
            Prompt(f"p{i}", (Message("user", words([2 + (i * 7 + k) % 1000 for k in draw])),), group=f"p{i}")
            for i in range(4 * ROLLOUTS)
        ]
        generators = placement.start_generators(base, weights_step=0, make_engine=InstantEngine)
        learner = placement.start_learner(lambda ranks: InstantLearner(config))
        scorers = placement.start_scorers(
            base, load=lambda: CombinedRewards({"one": Weighted(ModelSource([InstantScorer()]))})
        )
        placement.wait_ready()
        roles = Roles(generators, scorers, learner, NoHandoff())
        yield PPO(roles, prompts=PromptStream(prompts, seed=0), tokenizer=tokenizer, config=config)


def dispatcher(generators: int, rounds: int = 5, each: int = 32) -> bool:
    """Requests handed out and answers taken in, one generator's turn after the other, in this process alone."""
    sampling = Sampling(max_tokens=RESPONSE)
    requests = [
        GenerationRequest(f"bench/0/p{i}/0", f"p{i}", (2,) * PROMPT, seed=i, sampling=sampling)
        for i in range(each * generators)
    ]
    names = {f"generator-{slot}": slot for slot in range(generators)}
    took = []
    for _ in range(rounds):
        dispatch, start = Dispatch(slots=generators, fixed=False), time.perf_counter()
        dispatch.ask(requests)
        turns = deque(dispatch.hand_out(names).items())
        while turns:
            name, given = turns.popleft()
            dispatch.answered(name, Turn([_answered(request) for request in given], 0), weights_step=0)
            turns.extend(dispatch.hand_out({name: names[name]}).items())
        assert dispatch.done
        took.append(time.perf_counter() - start)
    per_s = len(requests) / statistics.median(took)
    print(f"dispatcher, {generators} generators: {per_s:,.0f} rollouts/s, {1e6 / per_s:.0f} microseconds each")
    return per_s >= WANTED_PER_S


_ROLLOUT = Rollout("", "", (2,) * PROMPT, (3,) * RESPONSE, (-1.0,) * RESPONSE, 0, "length")


def _answered(request: GenerationRequest) -> Rollout:
    return replace(_ROLLOUT, id=request.rollout_id, prompt_id=request.prompt_id)


def resident_mib() -> float:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
