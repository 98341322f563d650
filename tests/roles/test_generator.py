"""A generator stamps its rollouts, and samples only with weights that were verified."""

import pytest

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.roles.generator import Generator, Sampled
from rlhf_ray.types import Sampling, Span
from tests.roles.fakes import END, EchoEngine, FakeLearner, make_request


def test_each_request_gives_a_rollout_with_its_identity_and_the_weights_step() -> None:
    rollouts = Generator(EchoEngine(), weights_step=3).generate([make_request(0), make_request(1)]).rollouts
    assert [(r.id, r.prompt_id, r.weights_step) for r in rollouts] == [("run/0/p0/0", "p0", 3), ("run/0/p1/0", "p1", 3)]
    assert rollouts[1].response_ids == (5, 6, 8, END)
    assert rollouts[1].logprobs == (-1.0,) * 4


def test_without_a_weights_step_it_refuses_to_generate() -> None:
    generator = Generator(EchoEngine(), name="generator-1")
    assert generator.ping() is None
    with pytest.raises(InfrastructureError, match=r"generator-1 .* must not sample"):
        generator.generate([make_request()])


def test_loaded_weights_serve_only_after_their_release() -> None:
    generator = Generator(EchoEngine(), weights_step=0)
    generator.load_weights(FakeLearner(-2.0, weights_step=1).parcel())
    with pytest.raises(InfrastructureError, match="step 1 unverified"):
        generator.generate([make_request()])
    generator.release(1)
    assert generator.generate([make_request()]).rollouts[0].logprobs[0] == -2.0


def test_it_refuses_to_sample_with_another_step_than_the_wanted_one() -> None:
    with pytest.raises(InfrastructureError, match="holds weights step 0, step 1 is wanted"):
        Generator(EchoEngine(), weights_step=0).generate([make_request()], weights_step=1)


def test_only_the_step_that_is_held_can_be_released() -> None:
    with pytest.raises(AssertionError):
        Generator(EchoEngine(), weights_step=0).release(1)


def test_from_the_first_parcel_on_it_holds_no_step_at_all() -> None:
    generator = Generator(EchoEngine(), weights_step=0)
    assert generator.load_weights(FakeLearner(-2.0, weights_step=1).parcel()._replace(last=False)) is None
    assert generator.ping() is None
    with pytest.raises(AssertionError):
        generator.release(1)
    with pytest.raises(InfrastructureError, match="must not sample"):
        generator.generate([make_request()])


def test_a_receipt_states_what_was_received() -> None:
    sent = FakeLearner(-2.0, weights_step=4).parcel()
    receipts = []
    for byte in (0, 0, 1):
        contents = [flat.copy() for flat in sent.contents]
        contents[0][0] ^= byte
        receipts.append(Generator(EchoEngine()).load_weights(sent._replace(contents=contents)))
    assert {receipt.weights_step for receipt in receipts} == {4}
    assert receipts[0].sha256 == receipts[1].sha256 != receipts[2].sha256


class BrokenEngine(EchoEngine):
    def __init__(self, *answers: Sampled) -> None:
        super().__init__()
        self.answers = list(answers)

    def step(self) -> list[tuple[str, Sampled]]:
        self.waiting.clear()
        return [("run/0/p0/0", answer) for answer in self.answers]


WHOLE = (Span(0, 0),)


@pytest.mark.parametrize(
    "answers",
    [
        [],
        [Sampled((), (), "stop", WHOLE)],
        [Sampled((4, END), (-1.0,), "stop", WHOLE)],
        [Sampled((END,), (float("nan"),), "stop", WHOLE)],
        [Sampled((END,), (float("-inf"),), "stop", WHOLE)],
    ],
)
def test_a_missing_or_impossible_answer_is_an_error_and_no_rollout(answers: list[Sampled]) -> None:
    with pytest.raises(InfrastructureError):
        Generator(BrokenEngine(*answers), weights_step=0).generate([make_request()])


# Turns, and weights that are swapped under way.


def test_a_turn_gives_what_has_ended_and_says_how_much_is_under_way() -> None:
    generator = Generator(EchoEngine(), weights_step=0)
    short, long = make_request(0, prompt_ids=(5,)), make_request(1, prompt_ids=(5, 6, 7))
    assert generator.generate([short, long], for_s=0) == ([], 2)
    (rollout,), left = generator.generate([], for_s=0)
    assert (rollout.id, left) == (short.rollout_id, 1)
    (rollout,), left = generator.generate([make_request(2, prompt_ids=())], for_s=0)
    assert (rollout.id, left) == ("run/0/p2/0", 1)
    (rollout,), left = generator.generate([])
    assert (rollout.id, left) == (long.rollout_id, 0)


def test_tokens_before_and_after_a_swap_carry_their_weights_step() -> None:
    generator = Generator(EchoEngine(-1.0), weights_step=0)
    generator.generate([make_request(0)], for_s=0)
    swap(generator, -2.0, 1)
    generator.generate([], for_s=0)
    swap(generator, -3.0, 2)
    (rollout,), _ = generator.generate([])
    assert rollout.logprobs == (-1.0, -2.0, -3.0, -3.0)
    assert (rollout.weights_step, rollout.swaps, rollout.last_step) == (0, (Span(1, 1), Span(2, 2)), 2)


def test_what_ends_with_weights_in_doubt_is_held_back_until_their_release() -> None:
    generator = Generator(EchoEngine(-1.0), weights_step=0)
    generator.generate([make_request(0, prompt_ids=(5,))], for_s=0)
    generator.load_weights(FakeLearner(-2.0, weights_step=1).parcel())
    assert generator.generate([]) == ([], 1)
    generator.release(1)
    (rollout,), left = generator.generate([])
    assert (rollout.logprobs, left) == ((-1.0, -2.0), 0)


def test_probes_are_answered_beside_what_is_under_way_and_are_no_rollouts() -> None:
    generator = Generator(EchoEngine(-1.0), weights_step=0)
    generator.generate([make_request(0)], for_s=0)
    answers = generator.probe([[7], [8, 9]], Sampling(), seeds=[1, 2])
    assert [answer.ids for answer in answers] == [(7, END), (8, 9, END)]
    assert [rollout.id for rollout in generator.generate([]).rollouts] == ["run/0/p0/0"]


def swap(generator: Generator, logprob: float, step: int) -> None:
    generator.load_weights(FakeLearner(logprob, weights_step=step).parcel())
    generator.release(step)
