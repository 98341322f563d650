"""A generator stamps its rollouts, and samples only with weights that were verified."""

from dataclasses import replace

import pytest

from rlhf_ray.errors import InfrastructureError, WeightsMismatch
from rlhf_ray.roles.generator import Generator, Sampled
from rlhf_ray.types import Sampling
from tests.roles.fakes import END, EchoEngine, FakeLearner, make_request


def test_each_request_gives_a_rollout_with_its_identity_and_the_weights_step() -> None:
    rollouts = Generator(EchoEngine(), weights_step=3).generate([make_request(0), make_request(1)], Sampling())
    assert [(r.id, r.prompt_id, r.weights_step) for r in rollouts] == [("run/0/p0/0", "p0", 3), ("run/0/p1/0", "p1", 3)]
    assert rollouts[1].response_ids == (5, 6, 8, END)
    assert rollouts[1].logprobs == (-1.0,) * 4


def test_without_a_weights_step_it_refuses_to_generate() -> None:
    generator = Generator(EchoEngine(), name="generator-1")
    assert generator.ping() is None
    with pytest.raises(InfrastructureError, match=r"generator-1 .* must not sample"):
        generator.generate([make_request()], Sampling())


def test_loaded_weights_serve_only_after_their_release() -> None:
    generator = Generator(EchoEngine(), weights_step=0)
    generator.load_weights(FakeLearner(-2.0, weights_step=1).export_weights())
    with pytest.raises(InfrastructureError, match="step 1 unverified"):
        generator.generate([make_request()], Sampling())
    generator.release(1)
    assert generator.generate([make_request()], Sampling())[0].logprobs[0] == -2.0


def test_it_refuses_to_sample_with_another_step_than_the_wanted_one() -> None:
    with pytest.raises(InfrastructureError, match="holds weights step 0, step 1 is wanted"):
        Generator(EchoEngine(), weights_step=0).generate([make_request()], Sampling(), weights_step=1)


def test_only_the_step_that_is_held_can_be_released() -> None:
    with pytest.raises(AssertionError):
        Generator(EchoEngine(), weights_step=0).release(1)


def test_bytes_that_changed_on_the_way_are_refused_and_never_loaded() -> None:
    flat = FakeLearner(-2.0, weights_step=1).export_weights()
    damaged = flat.buffer.copy()
    damaged[0] ^= 1
    generator = Generator(EchoEngine(), weights_step=0)
    with pytest.raises(WeightsMismatch, match=flat.sha256):
        generator.load_weights(replace(flat, buffer=damaged))
    assert generator.engine.logprob == -1.0
    assert generator.ping() is None


def test_a_receipt_states_what_was_received() -> None:
    flat = FakeLearner(weights_step=4).export_weights()
    receipt = Generator(EchoEngine()).load_weights(flat)
    assert (receipt.weights_step, receipt.sha256, receipt.bytes) == (4, flat.sha256, flat.buffer.nbytes)


class BrokenEngine(EchoEngine):
    def __init__(self, *answers: Sampled) -> None:
        self.answers = list(answers)

    def generate(self, *_: object) -> list[Sampled]:
        return self.answers


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [Sampled((), (), "stop")],
        [Sampled((4, END), (-1.0,), "stop")],
        [Sampled((END,), (float("nan"),), "stop")],
        [Sampled((END,), (float("-inf"),), "stop")],
    ],
)
def test_a_missing_or_impossible_answer_is_an_error_and_no_rollout(answers: list[Sampled]) -> None:
    with pytest.raises(InfrastructureError):
        Generator(BrokenEngine(*answers), weights_step=0).generate([make_request()], Sampling())
