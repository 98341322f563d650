"""Weights on their way between real processes: by gloo, as an adapter alone, and of a mixture of experts."""

import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.config import load_config
from rlhf_ray.models.policy import load_tokenizer, new_policy, save_policy, train_tokenizer
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.placement import Placement
from rlhf_ray.roles.vllm_engine import VllmEngine
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.types import Sampling, Scored
from tests.models.tiny import new_experts
from tests.on_ray.conftest import SMALL
from tests.roles.fakes import EchoEngine, FakeLearner, make_request

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]
WORDS = "the blue lamp arrived broken,hello there my friend,where is my red chair,it has not come"


@pytest.fixture
def place(placement: Placement) -> Iterator[Callable[..., Placement]]:
    """Roles by other settings, on the shared Ray."""
    own: list[Placement] = []

    def make(*overrides: str) -> Placement:
        own.append(Placement(load_config(None, [*SMALL, *overrides]), started=True))
        return own[-1]

    yield make
    for each in own:
        each.stop_actors()


class SteppingLearner(FakeLearner):
    """Another weight at every step."""

    def prepare(self, *_: object) -> Any:
        return type("Nothing", (), {"metrics": {}})

    def update(self, _: object) -> dict[str, float]:
        self.weights_step += 1
        self.logprob -= 1.0
        return {}


def test_by_gloo_weights_reach_those_who_are_there_whoever_comes_or_dies(place: Callable[..., Placement]) -> None:
    placement = place(
        "resources.weights_transport=gloo", "resources.call_deadline_s=30", "rollout.generators=2",
        "rollout.min_generators=1",
    )  # fmt: skip
    generators = placement.start_generators(None, make_engine=EchoEngine, say=lambda _: None)
    learner = placement.start_learner(
        partial(SteppingLearner, -2.0, settings=["resources.weights_transport=gloo", "resources.call_deadline_s=30"])
    )
    placement.wait_ready()
    wait_for_two(generators)
    handoff = WeightsHandoff(learner, generators, vocabulary=100, context=256)
    generators.refit = handoff.publish
    handoff.publish(0)
    step_and_check(handoff, step=1)
    lost = "generator-1"
    pid = re.search(r"pid (\d+)", generators.nodes[lost])
    assert pid is not None
    os.kill(int(pid[1]), signal.SIGKILL)  # which nobody has noticed when the next hand-over begins
    step_and_check(handoff, step=2)
    assert lost not in generators.nodes
    wait_for_two(generators)
    step_and_check(handoff, step=3)
    assert set(generators.fleet.fit) == {"generator-0", "generator-1.2"}


def wait_for_two(generators: GeneratorGroup) -> None:
    deadline = time.monotonic() + 200
    while len(generators.names()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def step_and_check(handoff: WeightsHandoff, *, step: int) -> None:
    generators: Any = handoff.generators
    learner: Any = handoff.learner
    learner.prepare(Scored([], []))
    learner.update()
    assert handoff.publish(step)["sync/bytes"] == 4
    rollouts = generators.generate([make_request(i) for i in range(8)], Sampling())
    assert {(rollout.weights_step, rollout.logprobs[0]) for rollout in rollouts} == {(step, -2.0 - step)}


class ShakenLearner(Learner):
    """A learner whose every update changes whatever learns."""

    def update(self, _: object) -> dict[str, float]:
        draw = torch.Generator().manual_seed(self.weights_step)
        with torch.no_grad():
            for parameter in self.networks.policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape, generator=draw))
        self.weights_step += 1
        return {}

    def prepare(self, *_: object) -> Any:
        return type("Nothing", (), {"metrics": {}})


LORA = ["lora.rank=4", "resources.weights_transport=gloo"]


@pytest.mark.parametrize(
    ("kind", "settings", "alone"),
    [("dense", LORA, True), ("dense", [], False), ("experts", LORA, False), ("experts", [], False)],
)
def test_the_real_engine_holds_what_the_learner_has_learnt(
    place: Callable[..., Placement], tmp_path: Path, kind: str, settings: list[str], alone: bool
) -> None:
    placement = place("ppo.advantage=rloo", "rollout.samples=2", *settings)
    tokenizer = train_tokenizer(WORDS.split(","), vocabulary=512, context=256)
    base = tmp_path / "policy"
    if kind == "dense":
        save_policy(base, new_policy(placement.config.model, tokenizer, seed=1), tokenizer)
    else:
        save_policy(base, new_experts(len(tokenizer), tokenizer.eos_token_id), tokenizer)
    engine = partial(VllmEngine, base, context=256, kv_cache_mib=64)
    generators = placement.start_generators(base, weights_step=0, make_engine=engine)
    learner = placement.start_learner(partial(ShakenLearner.from_folder, base, placement.config))
    placement.wait_ready()
    handoff = WeightsHandoff(learner, generators, vocabulary=len(load_tokenizer(base)), context=256)
    for step in (1, 2):
        learner.prepare(Scored([], []))
        learner.update()
        metrics = handoff.publish(step)
        assert metrics["sync/probe_max_abs"] < 1e-4
    assert (metrics["sync/bytes"] < 40_000) == alone  # an adapter on experts does not fit what a folder calls them
    rollouts = generators.generate([make_request(i) for i in range(16)], Sampling(max_tokens=16))
    own = learner.logprobs_of([(r.prompt_ids, r.response_ids) for r in rollouts], Sampling(max_tokens=16))
    assert all(
        abs(a - b) < 1e-4 for row, r in zip(own, rollouts, strict=True) for a, b in zip(row, r.logprobs, strict=True)
    )
