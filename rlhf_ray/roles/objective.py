"""What an update of the policy minimises, by the config's choice."""

from typing import assert_never

from torch import Tensor

from rlhf_ray.algo.losses import (
    TokenLoss,
    cispo_loss,
    clip_loss,
    dual_clip_loss,
    gspo_loss,
    reinforce_loss,
)
from rlhf_ray.config import PPOConfig


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
