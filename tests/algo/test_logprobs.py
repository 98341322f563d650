import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algo.logprobs import entropy_from_logits, logprobs_and_entropy, token_logprobs

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31 - 1)


def test_entropies_equal_numbers_worked_by_hand() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf], [9.0, -torch.inf, -99.0, -99.0]])
    torch.testing.assert_close(entropy_from_logits(logits), torch.tensor([math.log(4), math.log(2), 0.0]))
    skewed = torch.tensor([0.5, 0.25, 0.25]).log()  # 0.5 ln 2 + 0.5 ln 4
    assert entropy_from_logits(skewed).item() == pytest.approx(1.5 * math.log(2), abs=1e-6)


@quick
@given(seeds, st.floats(-50, 50), st.floats(0.1, 20))
def test_entropy_equals_the_textbook_sum_and_ignores_a_shift(seed: int, shift: float, scale: float) -> None:
    logits = scale * torch.randn(11, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights = [math.exp(z - logits.max().item()) for z in logits.tolist()]
    wanted = -sum(w / sum(weights) * math.log(w / sum(weights)) for w in weights if w > 0)
    assert entropy_from_logits(logits + shift).item() == pytest.approx(wanted, abs=1e-9)


def test_entropy_has_a_finite_gradient_beside_an_impossible_token() -> None:
    logits = torch.tensor([1.0, 2.0, -torch.inf], requires_grad=True)
    entropy_from_logits(logits).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@quick
@given(seeds, st.floats(0.2, 3.0))
def test_token_logprobs_equal_the_textbook_softmax(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(2, 3, 7, generator=generator, dtype=torch.float64)
    ids = torch.randint(7, (2, 3), generator=generator)
    logprobs = token_logprobs(logits, ids, temperature=temperature)
    for b in range(2):
        for t in range(3):
            weights = [math.exp(z / temperature) for z in logits[b, t].tolist()]
            assert logprobs[b, t].item() == pytest.approx(math.log(weights[ids[b, t]] / sum(weights)), abs=1e-9)


@quick
@given(seeds, st.floats(0.1, 20))
def test_logprobs_with_entropy_are_both_and_have_the_same_gradient(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(6, 11, generator=generator, dtype=torch.float64)).requires_grad_()
    ids, weights = torch.randint(11, (6,), generator=generator), torch.randn(6, generator=generator)
    logprobs, entropy = logprobs_and_entropy(logits, ids)
    wanted = token_logprobs(logits, ids)
    torch.testing.assert_close(logprobs, wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(entropy, entropy_from_logits(logits), atol=1e-9, rtol=1e-9)
    assert not entropy.requires_grad
    gradients = [torch.autograd.grad((x * weights).sum(), logits)[0] for x in (logprobs, wanted)]
    torch.testing.assert_close(*gradients, atol=1e-9, rtol=1e-9)


def test_an_impossible_token_is_none_to_logprobs_with_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf], [1.0, 3.0, 2.0]], requires_grad=True)
    logprobs, entropy = logprobs_and_entropy(logits, torch.tensor([1, 0]))
    torch.testing.assert_close(entropy, entropy_from_logits(logits))
    assert logprobs[0].item() == pytest.approx(-math.log(2))
    logprobs.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad[0], torch.tensor([-0.5, 0.5, 0.0]))


def test_token_logprobs_equal_numbers_worked_by_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3)]] * 2)
    hot = token_logprobs(logits, torch.tensor([0, 1])).exp()
    torch.testing.assert_close(hot, torch.tensor([0.25, 0.75]))
    cold = token_logprobs(logits, torch.tensor([0, 1]), temperature=0.5).exp()  # weights 1 and 9
    torch.testing.assert_close(cold, torch.tensor([0.1, 0.9]))


def test_half_precision_logits_are_summed_in_full_precision() -> None:
    logits = torch.zeros(1, 1000, dtype=torch.bfloat16)
    assert token_logprobs(logits, torch.tensor([3])).item() == pytest.approx(-math.log(1000), abs=1e-5)
    assert entropy_from_logits(logits).item() == pytest.approx(math.log(1000), abs=1e-5)


def test_token_logprobs_keep_no_second_tensor_of_the_vocabulary_for_the_backward_pass() -> None:
    logits = torch.randn(4, 5, 300, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        token_logprobs(logits, torch.zeros(4, 5, dtype=torch.int64)).sum().backward()
    kept.pop(logits.untyped_storage().data_ptr(), None)
    assert sum(kept.values()) < logits.numel()
