import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algo.losses import (
    entropy_from_logits,
    masked_mean,
    policy_loss_clip,
    token_logprobs,
    value_loss_clipped,
)

quick = settings(deadline=None, max_examples=40)
seeds = st.integers(0, 2**31 - 1)
lengths = st.lists(st.integers(1, 6), min_size=2, max_size=5)


def right_padded(lengths: list[int], extra: int = 0) -> Tensor:
    return torch.arange(max(lengths) + extra) < torch.tensor(lengths).unsqueeze(1)


def draw(mask: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    a, b, c = torch.randn(3, *mask.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return a, b, c


def textbook_policy_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float) -> float:
    gains = []
    for n, o, a, inside in zip(*(x.flatten().tolist() for x in (new, old, advantages, mask)), strict=True):
        if inside:
            ratio = math.exp(n) / math.exp(o)
            gains.append(min(ratio * a, min(max(ratio, 1 - clip), 1 + clip) * a))
    return -sum(gains) / len(gains)


def textbook_value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float) -> float:
    errors = []
    for v, o, r, inside in zip(*(x.flatten().tolist() for x in (values, old, returns, mask)), strict=True):
        if inside:
            errors.append(max((v - r) ** 2, (o + min(max(v - o, -clip), clip) - r) ** 2))
    return sum(errors) / len(errors) / 2


def test_masked_mean_sees_the_mask_only() -> None:
    x = torch.tensor([[1.0, 2.0, torch.nan], [6.0, torch.inf, -torch.inf]])
    assert masked_mean(x, torch.tensor([[True, True, False], [True, False, False]])).item() == 3.0


def test_a_mean_of_nothing_is_no_number() -> None:
    assert masked_mean(torch.ones(2), torch.zeros(2, dtype=torch.bool)).isnan()


@quick
@given(lengths, seeds, st.floats(0.05, 0.5))
def test_policy_loss_equals_the_textbook_loop(lengths: list[int], seed: int, clip: float) -> None:
    mask = right_padded(lengths)
    new, old, advantages = draw(mask, seed)
    loss, _ = policy_loss_clip(new, old, advantages, mask, clip=clip)
    assert loss.item() == pytest.approx(textbook_policy_loss(new, old, advantages, mask, clip))


def test_policy_loss_and_stats_equal_numbers_worked_by_hand() -> None:
    # ratio:      1.5         0.5   1.5          0.5           1.5
    # advantage:  1           1     -1           -1            2
    # gain:       1.2 (clip)  0.5   -1.5         -0.8 (clip)   2.4 (clip)     sum 1.8, mean 0.36
    ratios = torch.tensor([[1.5, 0.5, 1.5, 0.5, 1.5]])
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0, 2.0]])
    old = torch.full((1, 5), -2.0)
    mask = torch.ones(1, 5, dtype=torch.bool)
    loss, stats = policy_loss_clip(old + ratios.log(), old, advantages, mask, clip=0.2)
    assert loss.item() == pytest.approx(-0.36, abs=1e-6)
    assert stats.clipfrac.item() == pytest.approx(0.6)
    assert stats.ratio.item() == pytest.approx(1.1)
    # ln 1.5 = 0.405465, ln 0.5 = -0.693147; (3 * 0.164402 + 2 * 0.480453) / 5 / 2
    assert stats.approxkl.item() == pytest.approx(0.145411, abs=1e-5)


def test_policy_gradient_is_the_advantage_inside_the_clip_and_zero_where_it_binds() -> None:
    new = torch.tensor([[0.0, math.log(1.5), math.log(0.5), math.log(1.5), math.log(0.5)]], requires_grad=True)
    advantages = torch.tensor([[3.0, 1.0, 1.0, -1.0, -1.0]])
    loss, _ = policy_loss_clip(new, torch.zeros(1, 5), advantages, torch.ones(1, 5, dtype=torch.bool), clip=0.2)
    loss.backward()  # dL/dlogprob = -A * ratio / 5 where the clip does not bind
    torch.testing.assert_close(new.grad, torch.tensor([[-0.6, 0.0, -0.1, 0.3, 0.0]]))


@quick
@given(lengths, seeds)
def test_rubbish_in_the_padding_reaches_neither_loss_nor_gradient(lengths: list[int], seed: int) -> None:
    short, long = right_padded(lengths), right_padded(lengths, 3)
    width = short.shape[1]
    results = []
    for mask, fill in ((short, 0.0), (long, torch.nan), (long, torch.inf)):
        new, old, third = (x[:, : mask.shape[1]].masked_fill(~mask, fill) for x in draw(long, seed))
        new.requires_grad_()
        policy_loss, stats = policy_loss_clip(new, old, third, mask, clip=0.2)
        value_loss = value_loss_clipped(new, old, third, mask, clip=0.2)
        (policy_loss + value_loss).backward()
        assert new.grad is not None
        assert not new.grad[~mask].any()
        results.append([policy_loss, value_loss, stats.approxkl, stats.clipfrac, stats.ratio, new.grad[:, :width]])
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(results[0], results[2])


@quick
@given(lengths, seeds, st.data())
def test_two_shards_weighted_by_their_tokens_make_the_whole(lengths: list[int], seed: int, data: st.DataObject) -> None:
    mask = right_padded(lengths)
    tensors = draw(mask, seed)
    cut = data.draw(st.integers(1, len(lengths) - 1))
    shards = [slice(0, cut), slice(cut, None)]
    for loss in (lambda *x: policy_loss_clip(*x, clip=0.2)[0], lambda *x: value_loss_clipped(*x, clip=0.2)):
        parts = [loss(*(x[s] for x in tensors), mask[s]) * mask[s].sum() / mask.sum() for s in shards]
        torch.testing.assert_close(sum(parts), loss(*tensors, mask))


@quick
@given(lengths, seeds, st.floats(0.05, 0.5))
def test_value_loss_equals_the_textbook_loop(lengths: list[int], seed: int, clip: float) -> None:
    mask = right_padded(lengths)
    values, old, returns = draw(mask, seed)
    loss = value_loss_clipped(values, old, returns, mask, clip=clip)
    assert loss.item() == pytest.approx(textbook_value_loss(values, old, returns, mask, clip))


def test_value_loss_and_gradient_equal_numbers_worked_by_hand() -> None:
    # value, old, return:  1.5, 1, 2  clipped to 1.2: max(0.25, 0.64) = 0.64, no gradient
    #                      0.5, 1, 2  clipped to 0.8: max(2.25, 1.44) = 2.25, gradient 0.5 - 2
    #                      1.1, 1, 2  not clipped:    0.81,                   gradient 1.1 - 2
    values = torch.tensor([[1.5, 0.5, 1.1]], requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = value_loss_clipped(values, torch.ones(1, 3), torch.full((1, 3), 2.0), mask, clip=0.2)
    loss.backward()
    assert loss.item() == pytest.approx((0.64 + 2.25 + 0.81) / 6, abs=1e-6)
    assert values.grad is not None
    torch.testing.assert_close(values.grad[0, :2] * 3, torch.tensor([0.0, -1.5]))
    assert -0.9 - 1e-6 <= values.grad[0, 2].item() * 3 <= -0.45 + 1e-6  # a tie of both branches: any split is right


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
