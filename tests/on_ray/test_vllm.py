"""The real engine: its log-probs are the learner's, and its weights are proven. Planted faults: test_planted.py."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import ClassVar

import pytest
import torch

from rlhf_ray.algo.logprobs import nucleus_logprobs
from rlhf_ray.models.policy import load_policy, load_tokenizer, new_policy, save_policy, train_tokenizer
from rlhf_ray.roles.generators import GeneratorGroup
from rlhf_ray.roles.groups import LearnerGroup
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.placement import Placement
from rlhf_ray.roles.vllm_engine import VllmEngine
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.types import GenerationRequest, Rollout, Sampling, Scored

pytestmark = [pytest.mark.ray, pytest.mark.timeout(800)]
COOL = Sampling(temperature=0.7, top_p=0.9, max_tokens=24)


class ShakenLearner(Learner):
    """A learner whose every update changes all weights."""

    def update(self, _: object) -> dict[str, float]:
        generator = torch.Generator().manual_seed(self.weights_step)
        with torch.no_grad():
            for parameter in self.networks.policy.parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        self.weights_step += 1
        return {"weights_step": float(self.weights_step)}

    def prepare(self, *_: object):  # type: ignore[no-untyped-def]
        return Nothing


class Nothing:
    metrics: ClassVar[dict[str, float]] = {}


@pytest.fixture(scope="module")
def folder(placement: Placement, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy; at its scale it is sure of some tokens, so that a nucleus means something."""
    path = tmp_path_factory.mktemp("vllm") / "policy"
    tokenizer = train_tokenizer(WORDS.split(","), vocabulary=512, context=256)
    policy = new_policy(placement.config.model, tokenizer, seed=1)
    save_policy(path, policy, tokenizer)
    return path


WORDS = "the blue lamp arrived broken,hello there my friend,where is my red chair,it has not come"


@pytest.fixture(scope="module")
def roles(placement: Placement, folder: Path) -> Iterator[tuple[GeneratorGroup, LearnerGroup]]:
    engine = partial(VllmEngine, folder, context=256, kv_cache_mib=64)
    generators = placement.start_generators(folder, weights_step=0, make_engine=engine)
    learner = placement.start_learner(partial(ShakenLearner.from_folder, folder, placement.config))
    placement.wait_ready()
    yield generators, learner
    placement.stop_actors()


@pytest.fixture
def handoff(roles: tuple[GeneratorGroup, LearnerGroup], folder: Path) -> WeightsHandoff:
    return WeightsHandoff(roles[1], roles[0], vocabulary=len(load_tokenizer(folder)), context=256)


def next_step(learner: LearnerGroup) -> int:
    """Lets the learner change its weights; returns the new step."""
    learner.prepare(Scored([], []))
    return int(learner.update()["weights_step"])


def some_requests(vocabulary: int, n: int = 48) -> list[GenerationRequest]:
    """Prompts of 3 to 190 tokens, some of them longer than one cache block."""
    draw = Random(0)
    lengths = [draw.randint(3, 190) for _ in range(n)]
    return [
        GenerationRequest(f"r{i}", f"p{i}", tuple(draw.randrange(6, vocabulary) for _ in range(length)), seed=i)
        for i, length in enumerate(lengths)
    ]


def worst_difference(rollouts: list[Rollout], folder: Path, sampling: Sampling) -> tuple[float, int, int]:
    """Against Hugging Face at the same weights: largest difference, tokens compared, tokens at a nucleus's edge."""
    policy = load_policy(folder)
    worst, compared, unsure = 0.0, 0, 0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
        with torch.no_grad():
            logits = policy(ids).logits[0, len(rollout.prompt_ids) - 1 : -1]  # (T, V)
        logprobs, ambiguous = nucleus_logprobs(
            logits, torch.tensor(rollout.response_ids), temperature=sampling.temperature, top_p=sampling.top_p
        )
        difference = (logprobs - torch.tensor(rollout.logprobs))[~ambiguous].abs()
        worst = max([worst, *difference.tolist()])
        compared, unsure = compared + len(difference), unsure + int(ambiguous.sum())
    return worst, compared, unsure


@pytest.mark.parametrize("sampling", [Sampling(max_tokens=24), COOL], ids=["temperature 1", "0.7, top-p 0.9"])
def test_behaviour_log_probs_are_those_of_hugging_face(
    roles: tuple[GeneratorGroup, LearnerGroup], folder: Path, sampling: Sampling
) -> None:
    rollouts = roles[0].generate(some_requests(len(load_tokenizer(folder))), sampling)
    worst, compared, unsure = worst_difference(rollouts, folder, sampling)
    assert worst <= 1e-4
    assert compared > 20 * unsure
    assert any(value < -0.1 for rollout in rollouts for value in rollout.logprobs)


def test_a_seed_draws_the_same_rollout_alone_and_in_a_batch(
    roles: tuple[GeneratorGroup, LearnerGroup], folder: Path
) -> None:
    requests = some_requests(len(load_tokenizer(folder)), n=12)
    together = roles[0].generate(requests, COOL)
    alone = [roles[0].generate([request], COOL)[0] for request in requests[:3]]
    assert [rollout.response_ids for rollout in alone] == [rollout.response_ids for rollout in together[:3]]


def test_a_response_ends_with_the_end_token_or_at_its_length(
    roles: tuple[GeneratorGroup, LearnerGroup], folder: Path
) -> None:
    tokenizer = load_tokenizer(folder)
    rollouts = roles[0].generate(some_requests(len(tokenizer), n=200), Sampling(max_tokens=24))
    stopped = [rollout for rollout in rollouts if rollout.finish_reason == "stop"]
    assert stopped
    assert all(
        rollout.response_ids.index(tokenizer.eos_token_id) == len(rollout.response_ids) - 1 for rollout in stopped
    )
    cut = [rollout for rollout in rollouts if rollout.finish_reason == "length"]
    assert all(len(rollout.response_ids) == 24 for rollout in cut)


def test_a_response_ends_at_a_token_that_the_config_names(
    roles: tuple[GeneratorGroup, LearnerGroup], folder: Path
) -> None:
    vocabulary = len(load_tokenizer(folder))
    rollouts = roles[0].generate(some_requests(vocabulary), Sampling(max_tokens=24))
    stop = rollouts[0].response_ids[3]
    assert stop not in rollouts[0].response_ids[:3]
    cut = roles[0].generate(some_requests(vocabulary), Sampling(max_tokens=24, stop_ids=(stop,)))
    for whole, rollout in zip(rollouts, cut, strict=True):
        found = whole.response_ids.index(stop) + 1 if stop in whole.response_ids else len(whole.response_ids)
        assert rollout.response_ids == whole.response_ids[:found]
        assert rollout.finish_reason == ("stop" if stop in rollout.response_ids else whole.finish_reason)


def test_every_step_weights_arrive_and_are_proven(
    roles: tuple[GeneratorGroup, LearnerGroup], handoff: WeightsHandoff, folder: Path
) -> None:
    generators, learner = roles
    requests = some_requests(len(load_tokenizer(folder)), n=8)
    before = generators.generate(requests, COOL)
    for _ in range(3):
        metrics = handoff.publish(next_step(learner))
        assert metrics["sync/probe_max_abs"] <= 1e-4
    after = generators.generate(requests, COOL)
    own = learner.logprobs_of([(rollout.prompt_ids, rollout.response_ids) for rollout in after], COOL)
    assert [rollout.response_ids for rollout in before] != [rollout.response_ids for rollout in after]
    assert (
        max(abs(a - b) for row, r in zip(own, after, strict=True) for a, b in zip(row, r.logprobs, strict=True)) < 1e-4
    )


def test_weights_swapped_while_rollouts_are_under_way_cut_none_short_and_are_stamped_on_the_tokens(
    roles: tuple[GeneratorGroup, LearnerGroup], handoff: WeightsHandoff, folder: Path
) -> None:
    generators, learner = roles
    requests = some_requests(len(load_tokenizer(folder)), n=16)
    sampling = Sampling(max_tokens=48)
    first = next_step(learner)
    handoff.publish(first)
    with generators.session(turn_s=0.02, max_staleness=1) as session:
        session.ask(requests, sampling)
        rollouts = session.take()
        before = logprobs_by(learner, rollouts, sampling)
        handoff.publish(next_step(learner))
        while ended := session.take():
            rollouts += ended
    assert sorted(rollout.id for rollout in rollouts) == sorted(request.rollout_id for request in requests)
    crossed = [rollout for rollout in rollouts if rollout.swaps]
    assert crossed
    assert all(len(r.response_ids) == 48 for r in rollouts if r.finish_reason == "length")
    after = logprobs_by(learner, rollouts, sampling)
    for rollout in rollouts:
        start = rollout.swaps[0].start if rollout.swaps else len(rollout.response_ids)
        assert (rollout.weights_step, rollout.last_step) == (first, first + bool(rollout.swaps))
        new = list(zip(after[rollout.id], rollout.logprobs, strict=True))[start:]
        assert all(abs(own - engines) < 1e-4 for own, engines in new)
        if rollout.id in before:
            assert all(abs(a - b) < 1e-4 for a, b in zip(before[rollout.id], rollout.logprobs, strict=True))
        old = list(zip(after[rollout.id], rollout.logprobs, strict=True))[:start]
        assert max(abs(own - engines) for own, engines in old) > 1e-3


def logprobs_by(learner: LearnerGroup, rollouts: list[Rollout], sampling: Sampling) -> dict[str, list[float]]:
    """The learner's own, as it stands."""
    rows = learner.logprobs_of([(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts], sampling)
    return {rollout.id: row for rollout, row in zip(rollouts, rows, strict=True)}
