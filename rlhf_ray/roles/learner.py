"""The learner: policy, critic and reference, and one PPO update of them.

PPO (Schulman 2017, eq. 7) with GAE, a clipped value loss and a per-token KL penalty to the reference inside the
reward (Ziegler 2019, eq. 2). The arithmetic is in `algo/`; this file decides what it is applied to.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForTokenClassification, PreTrainedModel

from rlhf_ray.algo.advantages import gae, whiten
from rlhf_ray.algo.batching import by_length, minibatches
from rlhf_ray.algo.kl import AdaptiveKL, kl_per_token
from rlhf_ray.algo.losses import (
    entropy_from_logits,
    masked_mean,
    nucleus_logprobs,
    policy_loss_clip,
    token_logprobs,
    value_loss_clipped,
)
from rlhf_ray.algo.shaping import RunningNorm, end_penalty, token_rewards
from rlhf_ray.config import Config
from rlhf_ray.errors import Diverged
from rlhf_ray.models.checkpoint import Checkpoint, prune, save_checkpoint
from rlhf_ray.models.folder import quiet_transformers
from rlhf_ray.models.policy import load_policy, load_tokenizer, save_policy
from rlhf_ray.roles.batch import Batch, Tokens, collate, collate_rollouts
from rlhf_ray.roles.weights import FlatWeights, flatten
from rlhf_ray.types import Rollout, Sampling

FORWARD_TOKENS = 8192
"""Tokens of one forward pass without gradient; bounds the memory that logits take."""
BAD_UPDATES_ALLOWED = 3
LEAST_REWARD_STD = 0.5
"""Rewards of a reward model that was learnt here are stretched to twice their size at most."""


class Learner:
    """One rank that learns. `weights_step` counts its updates; all methods are deterministic given the seed."""

    def __init__(
        self, policy: PreTrainedModel, *, reference: PreTrainedModel, critic: nn.Module, config: Config, base: Path
    ) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.policy, self.critic = policy.to(self.device), critic.to(self.device)
        self.reference = reference.to(self.device).requires_grad_(False)
        self.config, self.ppo = config, config.ppo
        self.sampling = Sampling(config.rollout.temperature, config.rollout.top_p, config.rollout.max_tokens)
        self.tokenizer = load_tokenizer(base)
        self.pad_id = int(self.tokenizer.pad_token_id)
        self.optimizers = {
            "policy": torch.optim.AdamW(self.policy.parameters(), lr=self.ppo.learning_rate, weight_decay=0.0),
            "critic": torch.optim.AdamW(self.critic.parameters(), lr=self.ppo.critic_learning_rate, weight_decay=0.0),
        }
        self.kl = AdaptiveKL(self.ppo.kl.coef, self.ppo.kl.target, self.ppo.kl.horizon)
        self.reward_norm = RunningNorm()
        self.weights_step = 0
        self.bad_updates = 0

    @classmethod
    def from_folder(cls, base: Path, config: Config) -> Self:
        """A learner at weights step 0: the policy, the reference and the critic's body are the base policy."""
        policy = load_policy(base)
        return cls(policy, reference=load_policy(base), critic=new_critic(base), config=config, base=base)

    def prepare(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> Batch:
        """Turns rollouts and their rewards into advantages, by the policy as it stands.

        Raises `Diverged` where the KL to the reference has passed `ppo.kl.limit`.
        """
        assert len(rollouts) == len(scores), "one reward for each rollout"
        tokens = collate_rollouts(rollouts, pad_id=self.pad_id).to(self.device)
        mask = tokens.mask
        logprobs, entropy, sampled_logprobs, unsure = self._own_logprobs(tokens)  # (B, T) each
        reference_logprobs = self._forward(tokens, lambda rows: (self._logprobs(self.reference, rows)[0],))[0]
        values = self._forward(tokens, lambda rows: (self._values(rows),))[0]
        kl = kl_per_token(logprobs, reference_logprobs, self.ppo.kl.estimator) * mask  # (B, T)
        kl_response = float(kl.sum(1).mean())
        if not kl_response <= self.ppo.kl.limit:  # NaN fails this too
            raise Diverged(
                f"KL to the reference is {kl_response:.2f} nats a response at weights step {self.weights_step}, above "
                f"ppo.kl.limit={self.ppo.kl.limit}; raise ppo.kl.coef, set ppo.kl.target or lower ppo.learning_rate"
            )
        raw = torch.tensor(scores, dtype=torch.float32, device=self.device)  # (B)
        shaped = self._shape(raw, rollouts)
        rewards = token_rewards(shaped, kl, mask, coef=self.kl.coef)  # (B, T)
        advantages, returns = gae(rewards, values, mask, gamma=self.ppo.gamma, lam=self.ppo.lam)
        if self.ppo.whiten_advantages:
            advantages = whiten(advantages, mask)
        metrics = {
            "objective/scores": float(raw.mean()),
            "objective/rlhf_reward": float(rewards.sum(1).mean()),
            "objective/kl": kl_response,
            "objective/kl_coef": self.kl.coef,
            "objective/entropy": float(masked_mean(entropy, mask)),
            **_mismatch(rollouts, sampled_logprobs, unsure, mask),
        }
        self.kl = self.kl.updated(kl_response, len(rollouts))
        return Batch(tokens, logprobs, values, advantages, returns, metrics)

    def update(self, batch: Batch) -> dict[str, float]:
        """`ppo.epochs` passes over the batch in minibatches; returns the mean of each statistic over them.

        A minibatch whose gradient is not finite changes nothing and is counted; the third in a row raises `Diverged`.
        """
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.weights_step)
        history: list[dict[str, Tensor]] = []
        skipped = 0
        for _ in range(self.ppo.epochs):
            for index in minibatches(len(batch.logprobs), self.ppo.minibatch, generator):
                stats = self._learn(batch, index.to(self.device))
                history.append(stats)
                skipped += int(stats["finite"] == 0)
        self.weights_step += 1
        means = {name: float(torch.stack([stats[name] for stats in history]).nanmean()) for name in history[0]}
        means.pop("finite")
        return {**means, "lr": self.ppo.learning_rate, "learn/skipped_updates": float(skipped)}

    def export_weights(self) -> FlatWeights:
        """The policy's weights for the generators, under the names that `save_pretrained` writes."""
        return flatten(self.policy.state_dict(), self.weights_step)

    @torch.no_grad()
    def logprobs_of(
        self, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], sampling: Sampling
    ) -> list[list[float]]:
        """Log-probs of each (prompt, response)'s response tokens under the policy as it stands, sampled so."""
        tokens = collate(sequences, pad_id=self.pad_id).to(self.device)
        logits = tokens.at_predictions(self.policy(tokens.ids, attention_mask=tokens.attention).logits)  # (B, T, V)
        logprobs, _ = nucleus_logprobs(
            logits, tokens.response_ids, temperature=sampling.temperature, top_p=sampling.top_p
        )
        return [row[: len(response)].tolist() for row, (_, response) in zip(logprobs, sequences, strict=True)]

    def mean_kl(self, rollouts: Sequence[Rollout]) -> float:
        """KL to the reference in nats a response, estimated on rollouts of the policy as it stands."""
        tokens = collate_rollouts(rollouts, pad_id=self.pad_id).to(self.device)
        logprobs = self._own_logprobs(tokens)[0]
        reference = self._forward(tokens, lambda rows: (self._logprobs(self.reference, rows)[0],))[0]
        return float((kl_per_token(logprobs, reference, self.ppo.kl.estimator) * tokens.mask).sum(1).mean())

    def save(self, folder: Path, step: int) -> str | None:
        """A checkpoint of everything that decides the rest of the run; where the disk refuses it, why."""
        tensors = {"policy": self.policy.state_dict(), "critic": self.critic.state_dict()}
        for name, optimizer in self.optimizers.items():
            moments = optimizer.state_dict()["state"]
            tensors[f"optimizer_{name}"] = {
                f"{index}.{key}": value for index, state in moments.items() for key, value in state.items()
            }
        state = {
            "weights_step": self.weights_step,
            "bad_updates": self.bad_updates,
            "kl": asdict(self.kl),
            "reward_norm": asdict(self.reward_norm),
        }
        try:
            save_checkpoint(folder, step, tensors=tensors, state=state)
            prune(folder, self.config.checkpoint.keep)
        except OSError as error:
            return str(error)
        return None

    def load(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint."""
        self.policy.load_state_dict(checkpoint.tensors["policy"])
        self.critic.load_state_dict(checkpoint.tensors["critic"])
        for name, optimizer in self.optimizers.items():
            moments: dict[int, dict[str, Tensor]] = {}
            for key, value in checkpoint.tensors[f"optimizer_{name}"].items():
                index, moment = key.split(".", 1)
                moments.setdefault(int(index), {})[moment] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        state = checkpoint.state
        self.weights_step, self.bad_updates = state["weights_step"], state["bad_updates"]
        self.kl, self.reward_norm = AdaptiveKL(**state["kl"]), RunningNorm(**state["reward_norm"])

    def save_policy(self, folder: Path) -> None:
        """The policy as a plain Hugging Face folder."""
        save_policy(folder, self.policy, self.tokenizer)

    def _shape(self, raw: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
        """(B) rewards, normalised by all that was seen so far, less the penalty for answers without an end."""
        shaped = raw
        if self.ppo.normalise_rewards:
            self.reward_norm = self.reward_norm.updated(raw)
            # a reward model of ours varies by 1, or by less where it knows less: that is not to be undone
            least_std = LEAST_REWARD_STD if self.config.reward_model.path is None else 0.0
            shaped = self.reward_norm.normalise(raw, self.ppo.reward_clip, least_std=least_std)
        finished = torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts], device=self.device)
        return end_penalty(shaped, finished, self.ppo.missing_end_penalty)

    def _learn(self, batch: Batch, index: Tensor) -> dict[str, Tensor]:
        tokens = batch.tokens.rows(index)
        mask, width = tokens.mask, tokens.mask.shape[1]
        logprobs, logits = self._logprobs(self.policy, tokens)
        policy_loss, stats = policy_loss_clip(
            logprobs, batch.logprobs[index, :width], batch.advantages[index, :width], mask, clip=self.ppo.clip
        )
        entropy = masked_mean(entropy_from_logits(logits), mask)
        value_loss = value_loss_clipped(
            self._values(tokens),
            batch.values[index, :width],
            batch.returns[index, :width],
            mask,
            clip=self.ppo.value_clip,
        )
        loss = policy_loss - self.ppo.entropy_coef * entropy + self.ppo.value_coef * value_loss
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norms = {
            "policy": nn.utils.clip_grad_norm_(self.policy.parameters(), self.ppo.max_grad_norm),
            "critic": nn.utils.clip_grad_norm_(self.critic.parameters(), self.ppo.max_grad_norm),
        }
        finite = bool(torch.isfinite(loss) and all(torch.isfinite(norm) for norm in norms.values()))
        if finite:
            for optimizer in self.optimizers.values():
                optimizer.step()
        self._count_bad_update(finite)
        return {
            "loss/policy_avg": policy_loss.detach(),
            "loss/value_avg": value_loss.detach(),
            "policy/approxkl_avg": stats.approxkl.detach(),
            "policy/clipfrac_avg": stats.clipfrac.detach(),
            "policy/entropy_avg": entropy.detach(),
            "val/ratio": stats.ratio.detach(),
            "learn/grad_norm": norms["policy"].detach(),
            "finite": torch.tensor(float(finite)),
        }

    def _count_bad_update(self, finite: bool) -> None:
        self.bad_updates = 0 if finite else self.bad_updates + 1
        if self.bad_updates >= BAD_UPDATES_ALLOWED:
            raise Diverged(
                f"{self.bad_updates} updates in a row had a loss or gradient that is not finite, last at weights step "
                f"{self.weights_step}; lower ppo.learning_rate, or look for extreme rewards"
            )

    def _logprobs(self, model: PreTrainedModel, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """(B, T) log-probs of the responses at the sampling temperature, and the (B, T, V) logits behind them."""
        logits = tokens.at_predictions(model(tokens.ids, attention_mask=tokens.attention).logits)
        logits = logits / self.sampling.temperature
        return token_logprobs(logits, tokens.response_ids), logits

    def _values(self, tokens: Tokens) -> Tensor:
        """(B, T) the critic's value of the state in which each response token was chosen."""
        outputs = self.critic(tokens.ids, attention_mask=tokens.attention).logits.squeeze(-1)  # (B, P+T)
        return tokens.at_predictions(outputs)

    def _own_logprobs(self, tokens: Tokens) -> tuple[Tensor, ...]:
        """(B, T) each: log-probs to learn with, entropy, log-probs as the engine samples, where those are unsure."""

        def one(rows: Tokens) -> tuple[Tensor, ...]:
            logprobs, logits = self._logprobs(self.policy, rows)
            if self.sampling.top_p == 1:
                return logprobs, entropy_from_logits(logits), logprobs, torch.zeros_like(rows.mask)
            sampled, unsure = nucleus_logprobs(logits, rows.response_ids, temperature=1.0, top_p=self.sampling.top_p)
            return logprobs, entropy_from_logits(logits), sampled, unsure

        return self._forward(tokens, one)

    @torch.no_grad()
    def _forward(self, tokens: Tokens, function: Any) -> tuple[Tensor, ...]:
        """`function` over the batch in pieces of like length, its (b, t) results put together as (B, T)."""
        lengths = tokens.attention.sum(1).tolist()
        results: tuple[Tensor, ...] | None = None
        for piece in by_length(lengths, max_tokens=FORWARD_TOKENS):
            index = torch.tensor(piece, device=self.device)
            rows = function(tokens.rows(index))
            if results is None:
                results = tuple(torch.zeros(tokens.mask.shape, dtype=row.dtype, device=self.device) for row in rows)
            for result, row in zip(results, rows, strict=True):
                result[index, : row.shape[1]] = row
        assert results is not None, "an empty batch reached the learner"
        return results


def new_critic(base: Path) -> PreTrainedModel:
    """The body of the base policy with a head that says 0, the mean of normalised rewards."""
    config = AutoConfig.from_pretrained(str(base), local_files_only=True, num_labels=1)
    config.classifier_dropout = 0.0
    with quiet_transformers():
        critic: PreTrainedModel = AutoModelForTokenClassification.from_pretrained(
            str(base), config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True
        )
    nn.init.zeros_(critic.get_parameter("score.weight"))
    nn.init.zeros_(critic.get_parameter("score.bias"))
    return critic


def _mismatch(rollouts: Sequence[Rollout], own: Tensor, unsure: Tensor, mask: Tensor) -> dict[str, float]:
    """How far the engine's behaviour log-probs are from the learner's own for the same weights.

    Tokens at whose position float error alone decides what the nucleus holds are left out, and counted.
    """
    behaviour = torch.zeros_like(own)
    for row, rollout in enumerate(rollouts):
        behaviour[row, : len(rollout.logprobs)] = torch.tensor(rollout.logprobs, device=own.device)
    sure = mask & ~unsure
    difference = torch.where(sure, behaviour - own, 0.0)  # (B, T)
    return {
        "mismatch/max_abs": float(difference.abs().max()),
        "mismatch/kl": float(masked_mean(difference, sure)),
        "mismatch/ratio_mean": float(masked_mean((-difference).exp(), sure)),
        "mismatch/left_out": float((mask & unsure).sum()),
    }
