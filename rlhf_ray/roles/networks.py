"""The networks that a learner holds, and what they say of a batch: log-probs, entropies, values."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rlhf_ray.algo.batching import dealt_by_length, dealt_by_weight
from rlhf_ray.algo.logprobs import entropy_from_logits, logprobs_and_entropy, nucleus_logprobs, token_logprobs
from rlhf_ray.config import ResourcesConfig
from rlhf_ray.models.logits import head_is_known, hidden_states, logits_from, outputs, plain_of
from rlhf_ray.models.lora import without_adapter, without_adapter_for_good
from rlhf_ray.models.packing import is_packed, pack_if_it_can
from rlhf_ray.roles.batch import Tokens
from rlhf_ray.roles.budget import TokenBudget
from rlhf_ray.roles.ranks import Ranks, is_sharded
from rlhf_ray.types import Sampling

ALONE, PLAIN = Ranks(), ResourcesConfig()
LOGITS_AT_ONCE = {"cpu": 2**23, "cuda": 2**28}
"""Numbers: 32 MiB and 1 GiB in float32. More are made piece by piece, and made again for the gradient rather than kept;
a GPU is idle between pieces that are too small for it."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a policy says of the response tokens of a batch; (B, T) each, 0 outside the mask."""

    logprobs: Tensor
    """At the sampling temperature: what is learnt with."""
    entropy: Tensor
    """Nats, of the same distribution."""
    sampled: Tensor
    """Log-probs of the nucleus that an engine samples from; the same where it samples from all."""
    unsure: Tensor
    """Bool: where float error decides what the nucleus holds."""


class Networks:
    """Policy, reference and, where the advantage needs one, critic, on one device."""

    def __init__(
        self,
        policy: Any,
        reference: PreTrainedModel | None,
        critic: nn.Module | None,
        sampling: Sampling,
        budget: TokenBudget,
        ranks: Ranks = ALONE,
        resources: ResourcesConfig = PLAIN,
    ) -> None:
        """Without a reference of its own, the policy without its adapter is the reference."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.sampling, self.budget, self.ranks, self.resources = sampling, budget, ranks, resources
        self.dtype: torch.dtype = getattr(torch, resources.learner_dtype)
        plain = [plain_of(model) for model in (policy, reference, critic) if model is not None]
        for model in plain:
            pack_if_it_can(model)
        self.in_halves = head_is_known(policy)
        self.packed = all(map(is_packed, plain))
        self.policy = self._learning(policy)
        self.critic = None if critic is None else self._learning(critic)
        self.reference = None
        if reference is not None:
            offload = "reference" in resources.learner_offload
            self.reference = self._held(reference.requires_grad_(False).to(self.dtype), offload=offload)

    def adopt(self, policy: PreTrainedModel) -> None:
        """Another policy in place of this one; the reference stays what it was."""
        if self.reference is None:
            self.reference = without_adapter_for_good(self.policy).requires_grad_(False)
        if self.packed:
            pack_if_it_can(policy)
        self.policy = self._learning(policy)

    def say(self, model: Any, tokens: Tokens, *, sampling: Sampling | None = None, learn_entropy: bool = False) -> Said:
        """What a policy says of the responses, sampled as the engines do or as told.

        Logits are made for response positions only, and never more than `LOGITS_AT_ONCE` of them: their peak does not
        grow with the batch, only with the vocabulary. Entropy has a gradient only where it is to be learnt.
        """
        sampling = sampling or self.sampling
        size = max(1, LOGITS_AT_ONCE[self.device.type] // self._vocabulary(model))

        def one(states: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            logits = logits_from(model, states) if self.in_halves else states  # (n, V)
            if sampling.temperature != 1:
                logits = logits / sampling.temperature
            if learn_entropy:
                logprobs, entropy = token_logprobs(logits, ids), entropy_from_logits(logits)
            else:
                logprobs, entropy = logprobs_and_entropy(logits, ids)
            if sampling.top_p == 1:
                return logprobs, entropy, logprobs, torch.zeros_like(ids, dtype=torch.bool)
            nucleus = nucleus_logprobs(logits.detach(), ids, temperature=1.0, top_p=sampling.top_p)
            return logprobs, entropy, *nucleus

        def forward(tokens: Tokens) -> tuple[Tensor, ...]:
            if self.in_halves:
                states = hidden_states(model, tokens.ids, tokens.attention)  # (B, L, H)
            else:
                states = outputs(model, tokens.ids, tokens.attention)  # (B, L, V)
            mask = tokens.mask
            states, ids = tokens.predictions(states), tokens.response_ids[mask]  # (N, H or V), (N)
            again = self.in_halves and len(ids) > size and torch.is_grad_enabled()
            parts = [
                checkpoint(one, *part, use_reentrant=False) if again else one(*part)
                for part in zip(states.split(size), ids.split(size), strict=True)
            ]
            columns = (torch.cat(column) for column in zip(*parts, strict=True))  # (N) each
            return tuple(torch.zeros_like(mask, dtype=x.dtype).masked_scatter(mask, x) for x in columns)

        with self._computing(model):
            return Said(*self.ranks.as_forward(model, forward)(tokens))

    def values(self, tokens: Tokens) -> Tensor:
        """(B, T) what the critic says of the state in which each response token was chosen."""
        assert self.critic is not None, "no critic here"
        with self._computing(self.critic):
            values = tokens.predictions(outputs(self.critic, tokens.ids, tokens.attention)).squeeze(-1)  # (N)
        return torch.zeros_like(tokens.mask, dtype=torch.float32).masked_scatter(tokens.mask, values.float())

    def all_own(self, tokens: Tokens) -> Said:
        """What the policy says, without gradient, in pieces that fit."""

        def one(rows: Tokens) -> tuple[Tensor, ...]:
            said = self.say(self.policy, rows)
            return tuple(getattr(said, field.name) for field in fields(said))

        return Said(*self._in_pieces(tokens, one))

    def all_reference_logprobs(self, tokens: Tokens) -> Tensor:
        """(B, T) without gradient."""
        model = self.policy if self.reference is None else self.reference
        with without_adapter(model):
            return self._in_pieces(tokens, lambda rows: (self.say(model, rows).logprobs,))[0]

    def all_values(self, tokens: Tokens) -> Tensor:
        """(B, T) without gradient."""
        return self._in_pieces(tokens, lambda rows: (self.values(rows),))[0]

    def dealt(self, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
        """Which sequences this rank takes, in parts of at most so many tokens; every rank has as many, some empty."""
        deal = dealt_by_weight if self.packed else dealt_by_length
        return deal(lengths, max_tokens=max_tokens, hands=self.ranks.count)[self.ranks.index]

    @torch.no_grad()
    def _in_pieces(self, tokens: Tokens, function: Callable[[Tokens], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`function` over the batch in pieces of like length, its (b, t) results put together as (B, T).

        Each rank computes its own pieces, and all get all.
        """
        lengths = tokens.attention.sum(1).tolist()

        def attempt(max_tokens: int) -> tuple[Tensor, ...]:
            results: tuple[Tensor, ...] | None = None
            for piece in self.dealt(lengths, max_tokens):
                index = torch.tensor(piece or [0], device=self.device)
                rows = function(tokens.rows(index))
                if results is None:
                    results = tuple(torch.zeros_like(tokens.mask, dtype=row.dtype) for row in rows)
                for result, row in zip(results, rows, strict=True) if piece else ():
                    result[index, : row.shape[1]] = row
            assert results is not None, "an empty batch reached the learner"
            return tuple(self.ranks.sum(result) for result in results)

        return self.budget.spend(attempt, all_of_it=tokens.attention.numel())

    def _learning(self, model: Any) -> Any:
        return self._held(model, offload="optimizer" in self.resources.learner_offload)

    def _held(self, model: Any, *, offload: bool) -> Any:
        if self.ranks.count == 1 and not offload:  # sharding alone would cost each layer its hooks
            return model.to(self.device)
        return self.ranks.shard(model, dtype=self.dtype, offload=offload)  # which brings it to the device

    def _computing(self, model: Any) -> AbstractContextManager[Any]:
        """In here what the model holds in float32 is computed in `dtype`; where it is sharded that has its own way."""
        if is_sharded(model) or self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(model.device.type, dtype=self.dtype)

    def _vocabulary(self, model: Any) -> int:
        return int(model.get_output_embeddings().weight.shape[0])
