"""Weights arrive whole, in the order of the rule, and a generator that holds others is found out."""

from dataclasses import replace

import pytest

from rlhf_ray.errors import InfrastructureError, TransferBroken, WeightsMismatch
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.weights import (
    CACHE_BLOCK,
    FRESH_TOKENS,
    PROBE_TOKENS,
    WeightsHandoff,
    probe_prompts,
)
from rlhf_ray.types import WeightsReceipt
from tests.roles.fakes import EchoEngine, FakeLearner, LocalPush, Recorder, make_request


def make_handoff(learner: FakeLearner, **generators: Generator) -> tuple[WeightsHandoff, Recorder]:
    recorder = Recorder(learner, **(generators or {"generator-0": Generator(EchoEngine(), name="generator-0")}))
    return WeightsHandoff(recorder, recorder, vocabulary=100, context=256), recorder


def test_weights_are_pushed_loaded_verified_and_released_in_this_order() -> None:
    handoff, recorder = make_handoff(FakeLearner(-2.0, weights_step=1))
    metrics = handoff.publish(1)
    assert recorder.events == ["push", "load", "verify", "release"]
    assert metrics["sync/verified"] == 1.0
    assert metrics["sync/probe_max_abs"] == 0.0


def test_after_a_hand_off_generators_sample_with_the_new_step() -> None:
    generator = Generator(EchoEngine(), weights_step=0)
    make_handoff(FakeLearner(-2.0, weights_step=1), g=generator)[0].publish(1)
    assert generator.generate([make_request()]).rollouts[0].weights_step == 1


class StaleEngine(EchoEngine):
    """Says that it loaded, and did not."""

    def take_over(self, logprob: float) -> None:
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
        stale.generate([make_request()])


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
    spoil_receipts(recorder, "generator-0")
    with pytest.raises(WeightsMismatch, match=r"generator-0 does not hold .* with sha256 other"):
        handoff.publish(1)
    assert recorder.events == ["push", "load"]


def spoil_receipts(recorder: Recorder, *names: str) -> None:
    load = recorder.load_weights
    recorder.load_weights = lambda pushed: {
        name: replace(receipt, sha256="other") if name in names else receipt for name, receipt in load(pushed).items()
    }


def test_where_the_config_says_so_one_that_is_found_out_is_retired_and_the_others_are_released() -> None:
    honest, stale = Generator(EchoEngine()), Generator(StaleEngine(-1.0))
    late = Generator(EchoEngine())
    handoff, recorder = make_handoff(FakeLearner(-2.0, weights_step=1), honest=honest, stale=stale, late=late)
    handoff.on_mismatch = "retire"
    spoil_receipts(recorder, "late")
    metrics = handoff.publish(1)
    assert recorder.events == ["push", "load", "retire late", "verify", "retire stale", "release"]
    assert (metrics["sync/retired"], metrics["sync/probe_max_abs"]) == (2.0, 0.0)
    assert (honest.ping(), stale.ping(), late.ping()) == (1, None, None)


def test_the_third_hand_over_in_a_row_that_finds_one_out_stops_the_run_all_the_same() -> None:
    learner = FakeLearner(-2.0)
    handoff, recorder = make_handoff(learner)
    handoff.on_mismatch = "retire"

    def publish(*engines: EchoEngine) -> dict[str, float]:
        learner.weights_step += 1
        recorder.generators = {f"generator-{i}": Generator(engine) for i, engine in enumerate(engines)}
        return handoff.publish(learner.weights_step)

    for engine in (StaleEngine(), StaleEngine(), EchoEngine(), StaleEngine(), StaleEngine()):
        publish(EchoEngine(), engine)
    with pytest.raises(WeightsMismatch):
        publish(EchoEngine(), StaleEngine())


class Breaking(Recorder):
    """The first transfers break, under which `losing` is found to be gone."""

    def __init__(self, learner: FakeLearner, *, times: int, losing: str | None, **generators: Generator) -> None:
        super().__init__(learner, **generators)
        self.times, self.losing = times, losing

    def load_weights(self, pushed: LocalPush) -> dict[str, WeightsReceipt]:
        receipts = super().load_weights(pushed)
        self.times -= 1
        if self.times >= 0:
            raise TransferBroken("reset by peer")
        return receipts

    def answering(self) -> list[str]:
        self.generators.pop(self.losing, None)
        return list(self.generators)


def test_a_transfer_that_broke_with_a_generator_is_made_again_without_it() -> None:
    generators = {name: Generator(EchoEngine()) for name in ("a", "b")}
    recorder = Breaking(FakeLearner(-2.0, weights_step=1), times=1, losing="b", **generators)
    WeightsHandoff(recorder, recorder, vocabulary=100, context=256).publish(1)
    assert recorder.events == ["push", "load", "push", "load", "verify", "release"]
    assert (generators["a"].ping(), generators["b"].ping()) == (1, None)


def test_a_transfer_that_broke_though_all_are_there_stops_the_run() -> None:
    recorder = Breaking(FakeLearner(weights_step=1), times=1, losing=None, a=Generator(EchoEngine()))
    with pytest.raises(TransferBroken):
        WeightsHandoff(recorder, recorder, vocabulary=100, context=256).publish(1)


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
        (36, [36 - PROBE_TOKENS, FRESH_TOKENS]),
        (6, [4, 4]),
        (3, [1, 1]),
    ],
)
def test_probes_cross_a_cache_block_where_the_context_has_room(context: int, lengths: list[int]) -> None:
    prompts = probe_prompts(0, vocabulary=50, context=context)
    assert [len(prompt) for prompt in prompts] == lengths
    assert all(0 <= token < 50 for prompt in prompts for token in prompt)
