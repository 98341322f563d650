"""Sequences one behind another in a single row, so that no layer computes anything for padding.

Only attention has to know where one ends and the next begins. On a GPU in half precision that is flash attention over
variable lengths; elsewhere attention alone lays its rows into rectangles of like length and takes them out again.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from rlhf_ray.algo.batching import by_length
from rlhf_ray.models.twin import twin_of

NAME = "rlhf_ray_packed"
"""What transformers knows this attention by."""
PADDING, LEAST = 1.25, 512
"""Of attention's rectangles: `by_length`'s bounds."""
_TAKEN_ELSEWHERE = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "use_cache", "output_router_logits", "output_attentions"}
)
"""What models hand down to their attention though it is not attention's to do."""


class CannotPack(Exception):
    """This attention does not do what the model asks of it."""


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences lie in a row of N tokens."""

    positions: Tensor
    """(N) of each token within its sequence."""
    ends: Tensor
    """(B + 1) int32: 0, and the end of each sequence."""
    longest: int
    rectangles: tuple[tuple[int, int], ...]
    """Attention's, where it needs some: rows and columns."""
    spread: Tensor
    """(M) for each place in the rectangles, row by row, the token that lies there; padding repeats a row's last."""
    places: Tensor
    """(N) the place of each token in the rectangles."""

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> "Packing":
        """Of sequences of these lengths, in this order."""
        counts = torch.tensor(lengths)
        starts = counts.cumsum(0) - counts
        groups = by_length(lengths, max_tokens=sum(lengths) * 2, padding=PADDING, least=LEAST)
        spread, places, at = [], torch.empty(int(counts.sum()), dtype=torch.long), 0
        for group in groups:
            index = torch.tensor(group)
            columns = torch.arange(lengths[group[0]])
            inside = columns < counts[index, None]
            tokens = starts[index, None] + torch.minimum(columns, counts[index, None] - 1)
            places[tokens[inside]] = at + torch.arange(tokens.numel()).view_as(tokens)[inside]
            spread.append(tokens.flatten())
            at += tokens.numel()
        return cls(
            positions=(torch.arange(len(places)) - starts.repeat_interleave(counts)).to(device),
            ends=torch.cat([starts, counts.sum().unsqueeze(0)]).to(device, torch.int32),
            longest=max(lengths),
            rectangles=tuple((len(group), lengths[group[0]]) for group in groups),
            spread=torch.cat(spread).to(device),
            places=places.to(device),
        )


def run_packed(module: Any, ids: Tensor, attention: Tensor, output: str) -> Tensor:
    """(B, L, ...) what a model or its body says under the name `output`, 0 on padding; ids, attention: (B, L)."""
    inside = attention.bool()
    packing = Packing.of(inside.sum(1).tolist(), ids.device)
    said = module(
        input_ids=ids[inside].unsqueeze(0),
        position_ids=packing.positions.unsqueeze(0),
        attention_mask=None,
        use_cache=False,
        packing=packing,
    )
    rows: Tensor = said[output][0]  # (N, ...)
    return rows.new_zeros(*ids.shape, *rows.shape[1:]).index_put((inside,), rows)


def is_packed(model: PreTrainedModel) -> bool:
    """Whether its attention is this one: then it has to be called by `run_packed`."""
    return bool(model.config._attn_implementation == NAME)


@torch.no_grad()
def pack_if_it_can(model: PreTrainedModel) -> None:
    """Makes the model's attention this one, where a twin's hidden states stay the same; else leaves it as it was.

    What is left: attention that looks ahead, caps or sinks, and architectures whose attention is not exchangeable.
    """
    try:
        twin = twin_of(model)
        attention = torch.tensor([[1] * 8, [1] * 5 + [0] * 3])
        ids = torch.arange(16).view(2, 8)
        wanted = twin.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
        twin.set_attn_implementation(NAME)
        found = run_packed(twin.base_model, ids, attention, "last_hidden_state")
    except (CannotPack, TypeError, ValueError, AttributeError, KeyError, RuntimeError):
        return
    if torch.allclose(found, wanted.masked_fill(attention.unsqueeze(-1) == 0, 0.0), rtol=1e-4, atol=1e-5):
        model.set_attn_implementation(NAME)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    packing: Packing | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence. query: (1, heads, N, D); key, value: (1, groups, N, D); (1, N, heads, D).

    Raises `CannotPack` for what it does not do.
    """
    assert packing is not None, "a model whose attention is packed has to be told where its sequences lie"
    asked = {name for name, value in more.items() if value is not None and name not in _TAKEN_ELSEWHERE}
    if asked or dropout or not getattr(module, "is_causal", True):
        raise CannotPack(f"attention with {sorted(asked) or 'dropout or a look ahead'}")
    if torch.is_autocast_enabled(query.device.type):  # as it would be in torch's own attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    if query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        out = _by_flash(query[0], key[0], value[0], packing, scaling, sliding_window)
    else:
        out = _by_rectangles(query[0], key[0], value[0], packing, scaling, sliding_window)
    return out.transpose(0, 1).unsqueeze(0), None


def _by_flash(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # here, for it wants a GPU's build of torch

    key, value = (_repeated(x, len(query)) for x in (key, value))
    q, k, v = (x.transpose(0, 1).contiguous() for x in (query, key, value))  # (N, heads, D)
    ends, longest = packing.ends, packing.longest
    looks_back = -1 if window is None else window - 1
    out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, scale=scaling, window_size=(looks_back, 0))
    rows: Tensor = out.transpose(0, 1)
    return rows


def _by_rectangles(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float | None, window: int | None
) -> Tensor:
    spread = (_repeated(to_rectangles(x, packing.spread, packing.places), len(query)) for x in (query, key, value))
    parts = zip(*(x.split([n * m for n, m in packing.rectangles], dim=1) for x in spread), strict=True)
    said = []
    for (rows, columns), part in zip(packing.rectangles, parts, strict=True):
        # heads stand where a batch usually does: nothing has to be transposed
        q, k, v = (x.unflatten(1, (rows, columns)) for x in part)
        band = None
        if window is not None and window < columns:
            band = torch.ones(columns, columns, dtype=torch.bool, device=query.device).tril().triu(1 - window)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=band, is_causal=band is None, scale=scaling)
        said.append(attended.flatten(1, 2))
    return from_rectangles(torch.cat(said, dim=1), packing.places)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """(heads, ...) of (groups, ...): several heads read the same keys and values."""
    return x if len(x) == heads else x.repeat_interleave(heads // len(x), dim=0)


class _ToRectangles(torch.autograd.Function):
    """(heads, N, D) to (heads, M, D). What lies on padding reaches no token, so no gradient comes back from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, spread: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(1, spread)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(1, places), None, None


class _FromRectangles(torch.autograd.Function):
    """(heads, M, D) to (heads, N, D)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        return x.index_select(1, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(1, places, gradient), None


to_rectangles: Callable[..., Tensor] = _ToRectangles.apply
from_rectangles: Callable[..., Tensor] = _FromRectangles.apply
AttentionInterface.register(NAME, packed_attention)
