import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.algo.correction import Correction, importance_weights
from tests.algo.batches import Ragged, parity, ragged

BOUNDS = {"low": 0.5, "high": 2.0}
HOW: list[Correction] = ["none", "token", "sequence", "band", "sequence_mask"]


def textbook(how: Correction, own: list[float], behaviour: list[float], *, low: float, high: float) -> list[float]:
    """The weights of one response's tokens."""
    ratios = [math.exp(a) / math.exp(b) for a, b in zip(own, behaviour, strict=True)]
    whole = math.prod(ratios)
    match how:
        case "none":
            return [1.0] * len(ratios)
        case "token":
            return [min(ratio, high) for ratio in ratios]
        case "sequence":
            return [min(whole, high)] * len(ratios)
        case "band":
            return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]
        case "sequence_mask":
            return [float(low <= whole ** (1 / len(ratios)) <= high)] * len(ratios) if ratios else []


@pytest.mark.parametrize("how", HOW)
@parity
@given(ragged())
def test_each_equals_the_textbook_loop(how: Correction, batch: Ragged) -> None:
    own, behaviour = batch.draw(2)
    found = importance_weights(own, behaviour, batch.mask, how=how, **BOUNDS)
    assert not found[~batch.mask].any()
    for weights, a, b in batch.rows(found, own, behaviour):
        assert weights == pytest.approx(textbook(how, a, b, **BOUNDS), abs=1e-6)


@pytest.mark.parametrize("how", HOW)
@parity
@given(ragged(), st.sampled_from([torch.nan, torch.inf, -torch.inf]))
def test_without_a_difference_every_token_weighs_one_whatever_lies_in_the_padding(
    how: Correction, batch: Ragged, rubbish: float
) -> None:
    (own,) = batch.draw(1)
    found = importance_weights(own.masked_fill(~batch.mask, rubbish), own, batch.mask, how=how, **BOUNDS)
    assert torch.equal(found, batch.mask.to(own.dtype))


def test_numbers_worked_by_hand() -> None:
    own = torch.tensor([[math.log(3.0), math.log(0.25), 0.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    found = {how: importance_weights(own, torch.zeros(1, 3), mask, how=how, **BOUNDS).tolist()[0] for how in HOW}
    assert found["token"] == pytest.approx([2.0, 0.25, 1.0])
    assert found["sequence"] == pytest.approx([0.75] * 3)
    assert found["band"] == pytest.approx([0.0, 0.0, 1.0])
    assert found["sequence_mask"] == [1.0] * 3  # 0.75 to the power of a third is 0.91


def test_weights_carry_no_gradient() -> None:
    own = torch.zeros(1, 2, requires_grad=True)
    assert not importance_weights(
        own, torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool), how="token", **BOUNDS
    ).requires_grad
