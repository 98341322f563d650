"""What an update of policy and critic minimises, by the config's choice."""

from collections.abc import Iterator
from typing import assert_never

import torch
from torch import Tensor

from rlhf_ray.algo.kl import kl_per_token
from rlhf_ray.algo.losses import (
    TokenLoss,
    Totals,
    average,
    cispo_loss,
    clip_loss,
    dual_clip_loss,
    gspo_loss,
    masked_mean,
    policy_stats,
    reinforce_loss,
    value_loss_clipped,
)
from rlhf_ray.config import Config, PPOConfig
from rlhf_ray.roles.batch import Batch, Tokens
from rlhf_ray.roles.networks import Networks

Part = tuple[Tensor, dict[str, Tensor]]
"""A loss, and statistics. Both are a part's share of the whole minibatch's: over all parts they add up to it."""


class Objective:
    """The loss of a part of a minibatch whose `Totals` are known, so that no split changes the gradient."""

    def __init__(self, networks: Networks, config: Config) -> None:
        self.networks, self.ppo, self.longest = networks, config.ppo, config.rollout.max_tokens

    def of(self, rows: Batch, totals: Totals, *, kl_coef: float, policy_learns: bool) -> Iterator[Part]:
        """Of rollouts: the policy's loss, entropy bonus and KL penalty, unless the critic learns alone; then its own.

        One network after the other, so that the activations of one are gone when the other's are made.
        """
        if policy_learns:
            yield self._policy(rows, totals, kl_coef=kl_coef)
        if rows.returns is not None and rows.values is not None:
            values, mask = self.networks.values(rows.tokens), rows.tokens.mask
            loss = value_loss_clipped(values, rows.values, rows.returns, mask, clip=self.ppo.value_clip, totals=totals)
            yield self.ppo.value_coef * loss, {"loss/value_avg": loss}

    def on_demonstrations(self, tokens: Tokens, totals: Totals) -> Part:
        """PPO-ptx: the mean loss a token, Ouyang et al. 2022 (arXiv:2203.02155), equation 2."""
        logprobs = self.networks.say(self.networks.policy, tokens).logprobs
        loss = -masked_mean(logprobs, tokens.mask, totals)
        return self.ppo.ptx_coef * loss, {"loss/ptx_avg": loss}

    def _policy(self, rows: Batch, totals: Totals, *, kl_coef: float) -> Part:
        ppo, mask = self.ppo, rows.tokens.mask
        said = self.networks.say(self.networks.policy, rows.tokens, learn_entropy=ppo.entropy_coef > 0)
        part = policy_token_loss(ppo, said.logprobs, rows.logprobs, rows.advantages, mask)
        policy_loss = self._average(part.loss * rows.weights, mask, totals)
        entropy = masked_mean(said.entropy, mask, totals)
        moved = policy_stats(said.logprobs, rows.logprobs, part.clipped, mask, totals)
        losses = [policy_loss]
        stats = {
            "loss/policy_avg": policy_loss,
            "policy/approxkl_avg": moved.approxkl,
            "policy/clipfrac_avg": moved.clipfrac,
            "policy/entropy_avg": entropy,
            "val/ratio": moved.ratio,
        }
        if ppo.entropy_coef:
            losses.append(-ppo.entropy_coef * entropy)
        if ppo.kl.where == "loss":
            kl = kl_per_token(said.logprobs, rows.reference_logprobs, ppo.kl.estimator)
            stats["loss/kl_avg"] = self._average(kl, mask, totals)
            losses.append(kl_coef * stats["loss/kl_avg"])
        return torch.stack(losses).sum(), stats

    def _average(self, x: Tensor, mask: Tensor, totals: Totals) -> Tensor:
        return average(x, mask, self.ppo.average, length=self.longest, totals=totals)


def policy_token_loss(
    ppo: PPOConfig, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor
) -> TokenLoss:
    """The loss of each token; all (B, T). `ppo.loss` chooses: see `algo/losses.py`."""
    low, high = ppo.clip, ppo.clip if ppo.clip_high is None else ppo.clip_high
    match ppo.loss:
        case "clip":
            return clip_loss(logprobs, old_logprobs, advantages, mask, low=low, high=high)
        case "dual_clip":
            return dual_clip_loss(logprobs, old_logprobs, advantages, mask, low=low, high=high, dual=ppo.dual_clip)
        case "gspo":
            return gspo_loss(logprobs, old_logprobs, advantages, mask, low=low, high=high)
        case "cispo":
            return cispo_loss(logprobs, old_logprobs, advantages, mask, high=high)
        case "reinforce":
            return reinforce_loss(logprobs, advantages, mask)
        case _:
            assert_never(ppo.loss)
