"""Log-probs and entropies from logits: what the losses are made of."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

EDGE = 1e-5
"""Closer than this, in probability or in nats, float error decides what belongs to a nucleus."""

_SORTED_AT_ONCE = 2**24
"""Logits sorted in one go: bounds the extra memory to about 0.3 GB, whatever the vocabulary."""


def entropy_from_logits(logits: Tensor) -> Tensor:
    """The entropy in nats of each next-token distribution; (..., V) gives (...).

    H = logsumexp(z) - sum_v softmax(z)_v * z_v (Shannon 1948, with p = softmax(z)). A token with logit -inf counts 0.
    For another temperature divide the logits first.
    """
    logits = _at_least_float32(logits)
    expected = (logits.softmax(dim=-1) * logits.masked_fill(logits == -torch.inf, 0.0)).sum(dim=-1)
    return torch.logsumexp(logits, dim=-1) - expected


def token_logprobs(logits: Tensor, ids: Tensor, *, temperature: float = 1.0) -> Tensor:
    """The log-probs in nats of given tokens, (...), in float32 at least.

    log p(x) = z_x / temperature - logsumexp(z / temperature): softmax's logarithm, of the tokens asked for only, so
    that no second (..., V) tensor is kept.

    logits: (..., V), where logits[..., t, :] predict ids[..., t]; ids: (...) int64.
    """
    scaled = _scaled(logits, temperature)
    return _pick(scaled, ids) - torch.logsumexp(scaled, dim=-1)


def logprobs_and_entropy(logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and `entropy_from_logits` without a gradient, from one softmax that the gradient uses again.

    logits: (N, V); ids: (N) int64; (N) each.
    """
    both: Callable[..., tuple[Tensor, Tensor]] = _LogprobsAndEntropy.apply
    return both(_at_least_float32(logits), ids)


class _LogprobsAndEntropy(torch.autograd.Function):
    """d log p(x) / dz = [v = x] - softmax(z)_v."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = logits.softmax(-1)
        # the likeliest token's probability is at least 1 / V, so its logarithm is sound
        top, likeliest = logits.max(-1)
        total = top - _pick(probabilities, likeliest).log()  # (N) logsumexp(z)
        expected = torch.linalg.vecdot(probabilities, logits)
        if not expected.isfinite().all():  # 0 times an impossible token's -inf
            expected = torch.linalg.vecdot(probabilities, logits.masked_fill(logits == -torch.inf, 0.0))
        ctx.save_for_backward(probabilities, ids)
        entropy = total - expected
        ctx.mark_non_differentiable(entropy)
        return _pick(logits, ids) - total, entropy

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None]:
        probabilities, ids = ctx.saved_tensors
        spread = probabilities * -gradient.unsqueeze(-1)
        return spread.scatter_add_(-1, ids.unsqueeze(-1), gradient.unsqueeze(-1)), None


def nucleus_logprobs(logits: Tensor, ids: Tensor, *, temperature: float, top_p: float) -> tuple[Tensor, Tensor]:
    """Log-probs of given tokens under top-p sampling (...), and where float error could decide them (...) bool.

    The nucleus is the smallest set of likeliest tokens whose mass reaches top_p; p(x) is renormalised over it and 0
    (log-prob -inf) outside it. Holtzman et al. 2020 (arXiv:1904.09751), section 3.1; after temperature, as vLLM does.
    Membership follows vLLM's sampler: of the ascending cumulated probabilities those at most 1 - top_p fall out, in
    float32, and the likeliest token always stays.

    `ambiguous` is true where a cumulated probability lies within 1e-5 of 1 - top_p, or the last token inside and the
    first outside within 1e-5 nats: there another machine's rounding may draw another nucleus. Equal logits on the
    edge all stay in, where vLLM drops some by sorting order; these are ambiguous too. The rule knows no scale: where
    the tokens on the edge are themselves lighter than 1e-5 (a large vocabulary, a flat distribution) every row is.

    logits: (..., V); ids: (...) int64. Gradients flow through the tokens inside; the nucleus itself is a constant.
    """
    if top_p >= 1.0:
        logprobs = token_logprobs(logits, ids, temperature=temperature)
        return logprobs, torch.zeros_like(ids, dtype=torch.bool)
    scaled = _scaled(logits, temperature)
    lowest, ambiguous = _nucleus_edge(scaled.detach(), top_p)
    inside = scaled.masked_fill(scaled < lowest.unsqueeze(-1), -torch.inf)  # (..., V)
    return _pick(inside, ids) - torch.logsumexp(inside, dim=-1), ambiguous


def _nucleus_edge(logits: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Each row's lowest logit inside the nucleus, and whether the edge is ambiguous; (..., V) gives (...) twice."""
    vocabulary = logits.shape[-1]
    cut = 1.0 - torch.tensor(top_p, dtype=logits.dtype, device=logits.device)
    rows = logits.reshape(-1, vocabulary)
    at_once = max(1, _SORTED_AT_ONCE // vocabulary)
    lowest, ambiguous = [rows.new_empty(0)], [torch.empty(0, dtype=torch.bool, device=rows.device)]
    for start in range(0, len(rows), at_once):
        ordered = rows[start : start + at_once].sort(dim=-1).values  # (N, V), ascending
        below = ordered.softmax(dim=-1).cumsum(dim=-1)[:, :-1]  # (N, V - 1): the likeliest token is never asked
        first = (below <= cut).sum(dim=-1, keepdim=True)  # (N, 1) place of the lowest token inside
        edge = ordered.gather(-1, first)
        outside = ordered.gather(-1, (first - 1).clamp(min=0))
        tied = (first > 0) & (edge - outside <= EDGE)
        lowest.append(edge.squeeze(-1))
        ambiguous.append(((below - cut).abs() <= EDGE).any(dim=-1) | tied.squeeze(-1))
    return torch.cat(lowest).view(logits.shape[:-1]), torch.cat(ambiguous).view(logits.shape[:-1])


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    logits = _at_least_float32(logits)
    return logits if temperature == 1.0 else logits / temperature


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _pick(x: Tensor, ids: Tensor) -> Tensor:
    return x.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
