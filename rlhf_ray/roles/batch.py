"""Rollouts as tensors: what the learner prepares and learns from.

Sequences are padded on the right. Everything of shape (B, T) is aligned to the response: column t belongs to the
t-th response token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.algo.batching import pad
from rlhf_ray.types import Rollout


@dataclass(frozen=True, slots=True)
class Tokens:
    """Padded token ids, and where the responses lie in them."""

    ids: Tensor
    """(B, P+T) prompt, response, padding."""
    attention: Tensor
    """(B, P+T) 1 on prompt and response."""
    prompt_lengths: Tensor
    """(B)"""
    response_ids: Tensor
    """(B, T)"""
    mask: Tensor
    """(B, T) true on response tokens."""

    def rows(self, index: Tensor) -> "Tokens":
        """Some of the sequences, with the columns cut that none of them uses."""
        picked = Tokens(*(getattr(self, field.name)[index] for field in fields(self)))
        width = int(picked.attention.sum(1).max())
        response_width = int(picked.mask.sum(1).max())
        return replace(
            picked,
            ids=picked.ids[:, :width],
            attention=picked.attention[:, :width],
            response_ids=picked.response_ids[:, :response_width],
            mask=picked.mask[:, :response_width],
        )

    def to(self, device: torch.device) -> "Tokens":
        """The same on another device."""
        return Tokens(*(getattr(self, field.name).to(device) for field in fields(self)))

    def predictions(self, outputs: Tensor) -> Tensor:
        """What the model said where it predicted each response token: (B, P+T, ...) to (N, ...), in the mask's order.

        Response token t of a row stands at position `prompt_length + t` and is predicted one position before.
        """
        rows, columns = self.mask.nonzero(as_tuple=True)
        return outputs[rows, self.prompt_lengths[rows] - 1 + columns]


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's rollouts, ready to learn from. All but `tokens` and `metrics` are (B, T)."""

    tokens: Tokens
    logprobs: Tensor
    """The policy's own before the update, at the sampling temperature."""
    reference_logprobs: Tensor
    advantages: Tensor
    weights: Tensor
    """Of each token's loss; 1 without a correction for who sampled it."""
    values: Tensor | None
    """The critic's before the update, in its own units; None without a critic."""
    returns: Tensor | None
    """The critic's targets, in its own units."""
    metrics: dict[str, float]

    def rows(self, index: Tensor) -> "Batch":
        """Some of the rollouts, with the columns cut that none of them uses."""
        tokens = self.tokens.rows(index)
        width = tokens.mask.shape[1]

        def cut(name: str) -> Any:
            x = getattr(self, name)
            return None if x is None else x[index, :width]

        cuts = {field.name: cut(field.name) for field in fields(self) if field.name not in ("tokens", "metrics")}
        return replace(self, tokens=tokens, **cuts)


def collate(sequences: Sequence[tuple[Sequence[int], Sequence[int]]], *, pad_id: int) -> Tokens:
    """(prompt ids, response ids) pairs as one padded batch."""
    prompts, responses = [list(prompt) for prompt, _ in sequences], [list(response) for _, response in sequences]
    joined = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    return Tokens(
        ids=pad(joined, value=pad_id, dtype=torch.long),
        attention=pad([[1] * len(row) for row in joined], value=0, dtype=torch.long),
        prompt_lengths=torch.tensor([len(prompt) for prompt in prompts]),
        response_ids=pad(responses, value=pad_id, dtype=torch.long),
        mask=pad([[True] * len(row) for row in responses], value=False, dtype=torch.bool),
    )


def collate_rollouts(rollouts: Sequence[Rollout], *, pad_id: int) -> Tokens:
    """A step's rollouts as one padded batch."""
    return collate([(rollout.prompt_ids, rollout.response_ids) for rollout in rollouts], pad_id=pad_id)
