"""Weights arrive whole, in the order of the rule, and a generator that holds others is found out."""

import pytest
import torch

from rlhf_ray.errors import InfrastructureError, WeightsMismatch
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.weights import (
    CACHE_BLOCK,
    FRESH_TOKENS,
    PROBE_TOKENS,
    WeightsHandoff,
    flatten,
    probe_prompts,
    unflatten,
)
from rlhf_ray.types import Sampling
from tests.roles.fakes import EchoEngine, FakeLearner, Recorder, make_request


def make_handoff(learner: FakeLearner, **generators: Generator) -> tuple[WeightsHandoff, Recorder]:
    recorder = Recorder(learner, **(generators or {"generator-0": Generator(EchoEngine(), name="generator-0")}))
    return WeightsHandoff(recorder, recorder, vocabulary=100, context=256), recorder


def test_flattened_weights_unfold_to_the_same_tensors() -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 4),
        "turned": torch.randn(4, 6).T,
    }
    found = dict(unflatten(flatten(tensors, 1)))
    assert list(found) == list(tensors)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in tensors.items()
    )


def test_tied_tensors_are_sent_under_both_names() -> None:
    shared = torch.randn(4, 2)
    found = dict(unflatten(flatten({"embed.weight": shared, "lm_head.weight": shared}, 0)))
    assert torch.equal(found["lm_head.weight"], shared)


def test_the_hash_tells_a_swapped_name_from_the_right_one() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    assert flatten({"x": a, "y": b}, 0).sha256 != flatten({"y": a, "x": b}, 0).sha256
    assert flatten({"x": a}, 0).sha256 == flatten({"x": a.clone()}, 1).sha256


def test_weights_are_pushed_loaded_verified_and_released_in_this_order() -> None:
    handoff, recorder = make_handoff(FakeLearner(-2.0, weights_step=1))
    metrics = handoff.publish(1)
    assert recorder.events == ["push", "load", "verify", "release"]
    assert metrics["sync/verified"] == 1.0
    assert metrics["sync/probe_max_abs"] == 0.0


def test_after_a_hand_off_generators_sample_with_the_new_step() -> None:
    generator = Generator(EchoEngine(), weights_step=0)
    make_handoff(FakeLearner(-2.0, weights_step=1), g=generator)[0].publish(1)
    assert generator.generate([make_request()], Sampling()).rollouts[0].weights_step == 1


class StaleEngine(EchoEngine):
    """Says that it loaded, and did not."""

    def load(self, weights: object) -> None:
        pass


def test_an_engine_that_kept_its_old_weights_is_named_with_both_figures_and_not_released() -> None:
    stale = Generator(StaleEngine(-1.0), name="generator-1")
    handoff, recorder = make_handoff(
        FakeLearner(-2.0, weights_step=1), g=Generator(EchoEngine(), name="generator-0"), stale=stale
    )
    with pytest.raises(WeightsMismatch, match=r"stale .* \(expected\) is -2\.0+, .* \(got\) -1\.0+; they differ by 1"):
        handoff.publish(1)
    assert recorder.events == ["push", "load", "verify"]
    with pytest.raises(InfrastructureError):
        stale.generate([make_request()], Sampling())


def test_a_difference_above_the_tolerance_is_caught_and_one_below_is_not() -> None:
    learner = FakeLearner(-2.0)
    handoff, recorder = make_handoff(learner)
    recorder.learner.logprobs_of = lambda sequences, _: [[-2.0 + 9e-5] * len(r) for _, r in sequences]
    assert handoff.publish(0)["sync/probe_max_abs"] == pytest.approx(9e-5)
    recorder.learner.logprobs_of = lambda sequences, _: [[-2.0 + 2e-4] * len(r) for _, r in sequences]
    with pytest.raises(WeightsMismatch):
        handoff.publish(0)


def test_a_learner_whose_log_probs_are_not_numbers_verifies_nothing() -> None:
    handoff, recorder = make_handoff(FakeLearner())
    recorder.learner.logprobs_of = lambda sequences, _: [[float("nan")] * len(r) for _, r in sequences]
    with pytest.raises(WeightsMismatch):
        handoff.publish(0)


def test_a_receipt_of_another_hash_stops_the_hand_off_before_the_probe() -> None:
    handoff, recorder = make_handoff(FakeLearner(-2.0, weights_step=1))
    other = FakeLearner(-3.0, weights_step=1).export_weights()
    load = recorder.load_weights
    recorder.load_weights = lambda pushed: {
        name: type(receipt)(receipt.weights_step, other.sha256, receipt.bytes, 0.0)
        for name, receipt in load(pushed).items()
    }
    with pytest.raises(WeightsMismatch, match=other.sha256):
        handoff.publish(1)
    assert recorder.events == ["push", "load"]


def test_publishing_a_step_that_the_learner_is_not_at_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        make_handoff(FakeLearner(weights_step=1))[0].publish(2)


def test_a_probe_begins_with_a_standing_block_and_ends_fresh_at_every_step() -> None:
    first, second = (probe_prompts(step, vocabulary=100, context=256) for step in (1, 2))
    assert first[0][:CACHE_BLOCK] == second[0][:CACHE_BLOCK]
    assert first[0][CACHE_BLOCK:] != second[0][CACHE_BLOCK:]
    assert first[1] != second[1]
    assert probe_prompts(1, vocabulary=100, context=256) == first
    assert probe_prompts(1, vocabulary=100, context=256, seed=7) != first


@pytest.mark.parametrize(
    ("context", "lengths"),
    [
        (256, [CACHE_BLOCK + FRESH_TOKENS, FRESH_TOKENS]),
        (64, [64 - PROBE_TOKENS, FRESH_TOKENS]),
        (6, [2, 2]),
        (4, [1, 1]),
    ],
)
def test_probes_cross_a_cache_block_where_the_context_has_room(context: int, lengths: list[int]) -> None:
    prompts = probe_prompts(0, vocabulary=50, context=context)
    assert [len(prompt) for prompt in prompts] == lengths
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
