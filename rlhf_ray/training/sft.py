"""Fits of a language model: self-supervised on all tokens of a text, supervised on the tokens of a response."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.algo.batching import pad
from rlhf_ray.config import FitConfig
from rlhf_ray.training import fit as fitting
from rlhf_ray.training.fit import Batch, FitResult

Tokens = tuple[list[int], int]
"""Token ids, and how many of them are the prompt's."""
IGNORED = -100
"""A label that is not learned."""


class NextToken:
    """Cross-entropy of each token of a sequence (ids, prompt length) after the prompt, given those before it.

    L = -sum_t log p(x_t | x_<t) over prompt length <= t, and t >= 1. Right-padded rows of like lengths: on CPU they
    run a third faster than several texts packed into a row, whose attention is paid for across texts too.
    """

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def length(self, item: Tokens) -> int:
        """Tokens of the sequence."""
        return len(item[0])

    def collate(self, items: Sequence[Tokens]) -> Batch:
        """`input_ids`, `attention_mask`, `labels`: each (B, longest)."""
        ids = pad([ids for ids, _ in items], value=self._pad_id, dtype=torch.long)  # (B, T)
        places = torch.arange(ids.shape[1])
        inside = places < torch.tensor([len(ids) for ids, _ in items])[:, None]  # (B, T)
        learned = inside & (places >= torch.tensor([prompt for _, prompt in items])[:, None])
        return {"input_ids": ids, "attention_mask": inside.long(), "labels": ids.masked_fill(~learned, IGNORED)}

    def terms(self, batch: Batch) -> int:
        """Tokens that are learned."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def loss(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Nats summed over the learned tokens."""
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        labels = batch["labels"][:, 1:].flatten()  # (B * (T - 1))
        return functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).float(), labels, ignore_index=IGNORED, reduction="sum"
        )


def fit_language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sequences: Sequence[Tokens],
    *,
    validation: Sequence[Tokens],
    fit: FitConfig,
    seed: int,
    stage: str,
    progress: Callable[[str], None],
    folder: Path | None = None,
) -> FitResult:
    """Trains the model in place on (token ids, prompt length) until its validation loss is flat.

    Only the tokens after the prompt are learned; a prompt length of 0 learns a whole text.
    """
    return fitting.fit(
        model,
        NextToken(tokenizer.pad_token_id),
        sequences,
        validation=validation,
        config=fit,
        seed=seed,
        stage=stage,
        progress=progress,
        folder=folder,
    )
