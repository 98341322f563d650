import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.algo.kl import AdaptiveKL, Estimator, kl_per_token

quick = settings(deadline=None, max_examples=40)
logprobs = st.lists(st.tuples(st.floats(-12, 0), st.floats(-12, 0)), min_size=1, max_size=8)

TEXTBOOK = {
    "k1": lambda log_p, log_q: log_p - log_q,
    "k2": lambda log_p, log_q: (log_p - log_q) ** 2 / 2,
    "k3": lambda log_p, log_q: math.exp(log_q) / math.exp(log_p) - 1 - (log_q - log_p),
}


@quick
@given(logprobs, st.sampled_from(["k1", "k2", "k3"]))
def test_estimators_equal_their_definitions(pairs: list[tuple[float, float]], estimator: Estimator) -> None:
    log_p, log_q = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    wanted = torch.tensor([TEXTBOOK[estimator](p, q) for p, q in pairs], dtype=torch.float64)
    torch.testing.assert_close(kl_per_token(log_p, log_q, estimator), wanted)


def test_estimators_equal_numbers_worked_by_hand() -> None:
    log_p, log_q = torch.tensor([0.5]).log(), torch.tensor([0.25]).log()  # d = ln 2, q / p = 1/2
    assert kl_per_token(log_p, log_q, "k1").item() == pytest.approx(0.693147, abs=1e-6)
    assert kl_per_token(log_p, log_q, "k2").item() == pytest.approx(0.240227, abs=1e-6)
    assert kl_per_token(log_p, log_q, "k3").item() == pytest.approx(0.193147, abs=1e-6)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_unbiased_estimators_average_to_the_divergence_itself(estimator: Estimator) -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.1, 0.4])
    divergence = 0.7 * math.log(1.4) + 0.2 * math.log(2) + 0.1 * math.log(0.25)
    assert (p * kl_per_token(p.log(), q.log(), estimator)).sum().item() == pytest.approx(divergence, abs=1e-6)


@quick
@given(st.floats(-12, 0), st.floats(-12, 0))
def test_k2_and_k3_are_never_negative(log_p: float, log_q: float) -> None:
    for estimator in ("k2", "k3"):
        assert kl_per_token(torch.tensor(log_p), torch.tensor(log_q), estimator) >= -1e-7


def test_k3_does_not_round_a_small_step_away() -> None:
    k3 = kl_per_token(torch.tensor(-1.0), torch.tensor(-1.001), "k3").item()
    assert k3 == pytest.approx(0.5e-6, rel=0.01)


def test_adaptive_kl_equals_numbers_worked_by_hand() -> None:
    start = AdaptiveKL(coef=0.1, target=6.0, horizon=1000)
    assert start.updated(12.0, 100).coef == pytest.approx(0.102)  # error 1, clipped to 0.2; 0.2 * 100 / 1000
    assert start.updated(6.6, 100).coef == pytest.approx(0.101)  # error 0.1
    assert start.updated(6.0, 100).coef == pytest.approx(0.1)
    assert start.updated(0.0, 100).coef == pytest.approx(0.098)  # error -1, clipped to -0.2
    assert start.coef == 0.1


def test_without_a_target_the_coefficient_stays() -> None:
    assert AdaptiveKL(coef=0.05, target=None, horizon=10).updated(1e9, 10**6).coef == 0.05


@quick
@given(st.floats(1e-3, 100), st.floats(-10, 1e6), st.integers(1, 10**6))
def test_the_coefficient_goes_the_right_way_and_never_loses_its_sign(target: float, kl: float, n: int) -> None:
    coef = AdaptiveKL(coef=0.1, target=target, horizon=50).updated(kl, n).coef
    assert 0.08 - 1e-9 <= coef <= 0.12 + 1e-9
    assert (coef >= 0.1) == (kl >= target)


def test_adaptive_kl_steers_a_responding_policy_to_its_target() -> None:
    controller, kl = AdaptiveKL(coef=1.0, target=6.0, horizon=500), 0.0
    for _ in range(400):
        kl = 0.6 / controller.coef  # a policy that drifts further, the less it is held back
        controller = controller.updated(kl, 64)
    assert kl == pytest.approx(6.0, rel=0.02)


def test_adaptive_kl_refuses_a_kl_that_is_no_number() -> None:
    with pytest.raises(AssertionError, match="not a number"):
        AdaptiveKL(coef=0.1, target=6.0, horizon=1000).updated(math.nan, 64)
