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
from rlhf_ray.types import Inserted, Rollout


@dataclass(frozen=True, slots=True)
class Tokens:
    """Padded token ids, and where the responses lie in them."""

    ids: Tensor
    """(B, P+T) prompt, response, padding."""
    attention: Tensor
    """(B, P+T) 1 on prompt and response."""
    positions: Tensor
    """(B, T) where in `ids` each of the response's tokens stands."""
    response_ids: Tensor
    """(B, T) the policy's own tokens: what an environment said in between is in `ids` alone."""
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
            positions=picked.positions[:, :response_width],
            response_ids=picked.response_ids[:, :response_width],
            mask=picked.mask[:, :response_width],
        )

    def to(self, device: torch.device) -> "Tokens":
        """The same on another device."""
        return Tokens(*(getattr(self, field.name).to(device) for field in fields(self)))

    def predictions(self, outputs: Tensor) -> Tensor:
        """What the model said where it predicted each response token: (B, P+T, ...) to (N, ...), in the mask's order.

        A token is predicted one position before the one at which it stands.
        """
        rows, _ = self.mask.nonzero(as_tuple=True)
        return outputs[rows, self.positions[self.mask] - 1]


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
    return _collate([(prompt, response, ()) for prompt, response in sequences], pad_id=pad_id)


def collate_rollouts(rollouts: Sequence[Rollout], *, pad_id: int) -> Tokens:
    """A step's rollouts as one padded batch."""
    return _collate(
        [(rollout.prompt_ids, rollout.response_ids, rollout.inserted) for rollout in rollouts], pad_id=pad_id
    )


def _collate(sequences: Sequence[tuple[Sequence[int], Sequence[int], Sequence[Inserted]]], *, pad_id: int) -> Tokens:
    joined, positions = zip(*(_woven(*sequence) for sequence in sequences), strict=True)
    responses = [list(response) for _, response, _ in sequences]
    return Tokens(
        ids=pad(joined, value=pad_id, dtype=torch.long),
        attention=pad([[1] * len(row) for row in joined], value=0, dtype=torch.long),
        positions=pad(positions, value=1, dtype=torch.long),
        response_ids=pad(responses, value=pad_id, dtype=torch.long),
        mask=pad([[True] * len(row) for row in responses], value=False, dtype=torch.bool),
    )


def _woven(prompt: Sequence[int], response: Sequence[int], inserted: Sequence[Inserted]) -> tuple[list[int], list[int]]:
    """The whole sequence, and where the response's tokens stand in it."""
    ids, done = list(prompt), 0
    positions: list[int] = []
    for before, heard in (*inserted, Inserted(len(response), ())):
        positions += range(len(ids), len(ids) + before - done)
        ids += response[done:before]
        ids += heard
        done = before
    return ids, positions
