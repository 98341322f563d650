import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.algo import logprobs
from rlhf_ray.algo.logprobs import nucleus_logprobs, token_logprobs

quick = settings(deadline=None, max_examples=60)
seeds = st.integers(0, 2**31 - 1)
temperatures = st.floats(0.3, 2.0)
top_ps = st.floats(0.05, 0.999)


def all_tokens(logits: Tensor, **sampling: float) -> tuple[Tensor, Tensor]:
    """Log-probs of the whole vocabulary, (N, V), and whether each row is ambiguous, (N)."""
    n, vocabulary = logits.shape
    ids = torch.arange(vocabulary).expand(n, -1)
    logprobs, ambiguous = nucleus_logprobs(logits.unsqueeze(1).expand(-1, vocabulary, -1), ids, **sampling)
    return logprobs, ambiguous[:, 0]


def textbook_nucleus(logits: list[float], temperature: float, top_p: float) -> list[float]:
    """Probabilities of sampling from the likeliest tokens, taken until their mass reaches top_p."""
    weights = [math.exp((z - max(logits)) / temperature) for z in logits]
    probs = [w / sum(weights) for w in weights]
    inside: list[int] = []
    for token in sorted(range(len(probs)), key=lambda v: -probs[v]):
        inside.append(token)
        if sum(probs[v] for v in inside) >= top_p:
            break
    mass = sum(probs[v] for v in inside)
    return [probs[v] / mass if v in inside else 0.0 for v in range(len(probs))]


@quick
@given(seeds, temperatures, top_ps)
def test_the_nucleus_equals_the_textbook_loop(seed: int, temperature: float, top_p: float) -> None:
    logits = 2 * torch.randn(5, 17, generator=torch.Generator().manual_seed(seed))
    logprobs, ambiguous = all_tokens(logits, temperature=temperature, top_p=top_p)
    for row in range(5):
        if not ambiguous[row]:
            wanted = torch.tensor(textbook_nucleus(logits[row].tolist(), temperature, top_p))
            torch.testing.assert_close(logprobs[row].exp(), wanted, rtol=1e-4, atol=1e-6)


def test_the_nucleus_equals_numbers_worked_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()
    for top_p, wanted in [(0.4, [1, 0, 0, 0]), (0.6, [0.625, 0.375, 0, 0]), (0.9, [10 / 19, 6 / 19, 3 / 19, 0])]:
        logprobs, ambiguous = all_tokens(logits, temperature=1.0, top_p=top_p)
        torch.testing.assert_close(logprobs.exp(), torch.tensor([wanted], dtype=torch.float32))
        assert not ambiguous.any()


def test_temperature_comes_before_the_nucleus() -> None:
    logits = torch.tensor([[9.0, 3.0, 1.0]]).sqrt().log()  # at temperature 1/2: 9/13, 3/13, 1/13
    logprobs, _ = all_tokens(logits, temperature=0.5, top_p=0.9)
    torch.testing.assert_close(logprobs.exp(), torch.tensor([[0.75, 0.25, 0.0]]))


@quick
@given(seeds, temperatures, top_ps)
def test_what_is_inside_sums_to_one_and_holds_the_likeliest(seed: int, temperature: float, top_p: float) -> None:
    logits = 3 * torch.randn(4, 50, generator=torch.Generator().manual_seed(seed))
    logprobs, _ = all_tokens(logits, temperature=temperature, top_p=top_p)
    torch.testing.assert_close(logprobs.exp().sum(-1), torch.ones(4))
    assert logprobs.gather(-1, logits.argmax(-1, keepdim=True)).isfinite().all()


@quick
@given(seeds, temperatures)
def test_the_whole_vocabulary_is_plain_sampling(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, ids = torch.randn(2, 3, 9, generator=generator), torch.randint(9, (2, 3), generator=generator)
    logprobs, ambiguous = nucleus_logprobs(logits, ids, temperature=temperature, top_p=1.0)
    assert torch.equal(logprobs, token_logprobs(logits, ids, temperature=temperature))
    assert ambiguous.shape == ids.shape
    assert not ambiguous.any()


@pytest.mark.parametrize(
    ("probs", "top_p", "wanted"),
    [
        ([0.5, 0.3, 0.2], 0.8, True),  # the mass of two tokens is top_p to the last bit
        ([0.5, 0.300005, 0.199995], 0.8, True),  # within 1e-5 of it
        ([0.5, 0.30003, 0.19997], 0.8, False),  # not within
        ([0.5, 0.299970, 0.20003], 0.8, False),
        ([0.4, 0.2, 0.2, 0.2], 0.5, True),  # equals on the edge: which of them falls out is a matter of sorting
        ([0.25, 0.25, 0.3, 0.2], 0.7, False),  # equals inside: no matter
    ],
)
def test_an_edge_that_rounding_decides_is_called_ambiguous(probs: list[float], top_p: float, wanted: bool) -> None:
    logits = torch.tensor([probs]).log()
    ids = torch.zeros(1, dtype=torch.int64)
    assert nucleus_logprobs(logits, ids, temperature=1.0, top_p=top_p)[1].item() is wanted


@pytest.mark.parametrize("vocabulary", [40, 1024, 8000])
def test_exactly_the_edges_near_top_p_in_double_precision_are_called_ambiguous(vocabulary: int) -> None:
    spread = torch.linspace(0.5, 6.0, 200).unsqueeze(1)
    logits = spread * torch.randn(200, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    _, ambiguous = nucleus_logprobs(logits, torch.zeros(200, dtype=torch.int64), temperature=1.0, top_p=0.9)
    seen = set()
    for row, flag in zip(logits.tolist(), ambiguous.tolist(), strict=True):
        weights = sorted((math.exp(z) for z in row), reverse=True)
        total = math.fsum(weights)
        masses = [mass / total for mass in itertools.accumulate(weights)]
        last = next(i for i, mass in enumerate(masses) if mass >= 0.9)
        distance = min(abs(mass - 0.9) for mass in masses)
        gap = math.log(weights[last] / weights[last + 1])
        if not (0.8e-5 < distance < 1.2e-5 or 0.8e-5 < gap < 1.2e-5):  # float32's own error
            assert flag == (distance <= 1e-5 or gap <= 1e-5)
            seen.add(flag)
    assert False in seen
    assert vocabulary == 40 or True in seen


@quick
@given(seeds, temperatures, top_ps, st.floats(-3e-6, 3e-6))
def test_where_it_is_not_ambiguous_a_little_noise_changes_no_membership(
    seed: int, temperature: float, top_p: float, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(64, 40, generator=generator, dtype=torch.float64)
    noise = size * temperature * torch.rand(64, 40, generator=generator, dtype=torch.float64)
    plain, ambiguous = all_tokens(logits, temperature=temperature, top_p=top_p)
    noisy, _ = all_tokens(logits + noise, temperature=temperature, top_p=top_p)
    sure = ~ambiguous
    assert sure.any()
    assert torch.equal(plain[sure].isfinite(), noisy[sure].isfinite())


def test_rows_sorted_in_pieces_give_the_same_as_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, ids = torch.randn(3, 5, 20), torch.randint(20, (3, 5))
    whole = nucleus_logprobs(logits, ids, temperature=0.7, top_p=0.9)
    monkeypatch.setattr(logprobs, "_SORTED_AT_ONCE", 45)  # two rows
    pieces = nucleus_logprobs(logits, ids, temperature=0.7, top_p=0.9)
    assert torch.equal(whole[0], pieces[0])
    assert torch.equal(whole[1], pieces[1])


def test_no_rows_give_no_rows() -> None:
    logprobs, ambiguous = nucleus_logprobs(torch.ones(0, 8), torch.ones(0, dtype=torch.int64), temperature=1, top_p=0.9)
    assert logprobs.shape == ambiguous.shape == (0,)


def test_gradients_stay_inside_the_nucleus_and_finite() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]] * 2).log().requires_grad_()
    logprobs, _ = nucleus_logprobs(logits, torch.tensor([0, 3]), temperature=1.0, top_p=0.6)
    assert logprobs[1] == -torch.inf  # the last token lies outside
    logprobs[0].backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.375, -0.375, 0.0, 0.0], [0.0] * 4]))  # 1 - p, -p


@pytest.mark.slow
@pytest.mark.parametrize("vocabulary", [1024, 32000])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.9), (1.0, 0.95), (1.3, 0.5), (1.0, 0.01), (0.7, 1.0)])
def test_the_nucleus_equals_vllm_s_own(vocabulary: int, temperature: float, top_p: float) -> None:
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler", reason="vLLM is not installed")
    generator = torch.Generator().manual_seed(vocabulary)
    spread = torch.linspace(0.5, 6.0, 512).unsqueeze(1)  # from nearly flat to nearly certain
    logits = spread * torch.randn(512, vocabulary, generator=generator)
    theirs = sampler.apply_top_k_top_p_pytorch(logits / temperature, None, torch.full((512,), top_p))
    ids = theirs.softmax(-1).multinomial(1, generator=generator)  # a token that vLLM could have drawn
    logprobs, ambiguous = nucleus_logprobs(logits, ids.squeeze(1), temperature=temperature, top_p=top_p)
    wanted = theirs.log_softmax(-1).gather(-1, ids).squeeze(1)
    sure = ~ambiguous
    assert sure.any()  # how many may be: the test of the flag against double precision
    torch.testing.assert_close(logprobs[sure], wanted[sure], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_mass_of_exactly_top_p_is_cut_where_vllm_cuts_it() -> None:
    sampler = pytest.importorskip("vllm.v1.sample.ops.topk_topp_sampler", reason="vLLM is not installed")
    logits = torch.tensor([[0.5, 0.375, 0.125]]).log()
    theirs = sampler.apply_top_k_top_p_pytorch(logits.clone(), None, torch.tensor([0.5]))
    logprobs, ambiguous = all_tokens(logits, temperature=1.0, top_p=0.5)
    assert torch.equal(logprobs.isfinite(), theirs.isfinite())
    assert ambiguous.all()
