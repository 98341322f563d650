"""From a step's scores to its advantages: which of the formulas in `algo/` is applied to what."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, assert_never

import torch
from torch import Tensor

from rlhf_ray.algo import groups
from rlhf_ray.algo.advantages import gae, reward_to_go, spread, trajectory_return, whiten, whiten_by_group
from rlhf_ray.algo.shaping import RunningNorm, end_penalty, overlong_penalty, standardised
from rlhf_ray.config import Config
from rlhf_ray.types import Rollout

LEAST_REWARD_STD = 0.5
"""Rewards of a reward model that was learnt here are stretched to twice their size at most."""


@dataclass(frozen=True, slots=True)
class Responses:
    """What is known of a step's responses besides their tokens; all (B)."""

    groups: Tensor
    """Int, equal for responses to one prompt."""
    lengths: Tensor
    finished: Tensor
    """Bool: ended by their own end token."""

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], device: torch.device) -> "Responses":
        """Of rollouts in their order."""
        numbers = {prompt_id: number for number, prompt_id in enumerate(dict.fromkeys(r.prompt_id for r in rollouts))}
        return cls(
            groups=torch.tensor([numbers[rollout.prompt_id] for rollout in rollouts], device=device),
            lengths=torch.tensor([len(rollout.response_ids) for rollout in rollouts], device=device),
            finished=torch.tensor([rollout.finish_reason == "stop" for rollout in rollouts], device=device),
        )


class AdvantageEstimator:
    """Remembers what normalises rewards and, where the config says so, returns."""

    def __init__(self, config: Config) -> None:
        self.ppo = config.ppo
        self.longest = config.rollout.max_tokens * config.rollout.turns
        # a reward model of ours varies by 1, or by less where it knows less: that is not to be undone
        self.least_std = (
            LEAST_REWARD_STD if config.reward_model.path is None and config.rewards.own_model_alone else 1e-8
        )
        self.reward_norm = RunningNorm()
        self.value_norm = RunningNorm()

    def shape(self, scores: Tensor, responses: Responses) -> Tensor:
        """(B) rewards: the scores normalised, less the penalties for how an answer ends and how long it is."""
        ppo = self.ppo
        match ppo.reward_norm:
            case "running":
                self.reward_norm = self.reward_norm.updated(scores)
                shaped = self.reward_norm.normalise(scores, None, least_std=self.least_std)
            case "batch":
                shaped = standardised(scores, least_std=self.least_std)
            case "group":
                shaped = standardised(scores, responses.groups, least_std=self.least_std)
            case "none":
                shaped = scores
            case _:
                assert_never(ppo.reward_norm)
        return self._penalised(shaped, responses)

    def shape_baseline(self, scores: Tensor, responses: Responses) -> Tensor:
        """(B) rewards of responses that are compared with and not learnt from, in the units of the last `shape`."""
        assert self.ppo.reward_norm in ("running", "none"), "another norm would centre the baseline by itself"
        if self.ppo.reward_norm == "running":
            scores = self.reward_norm.normalise(scores, None, least_std=self.least_std)
        return self._penalised(scores, responses)

    def estimate(
        self, rewards: Tensor, mask: Tensor, *, numbers: Tensor, values: Tensor | None, baseline: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Advantages and, with a critic, its targets; (B, T) each.

        rewards: (B, T) by token; numbers: (B) int, each response's group; values: (B, T) the critic's, where there is
        one; baseline: (B) rewards of the likeliest responses, for ReMax.
        """
        ppo, targets = self.ppo, None
        returns = rewards.sum(1)  # (B)
        match ppo.advantage:
            case "gae":
                assert values is not None, "GAE needs a critic"
                advantages, targets = gae(rewards, values, mask, gamma=ppo.gamma, lam=ppo.lam)
            case "reinforce" if ppo.credit == "trajectory":
                advantages = trajectory_return(rewards, mask, gamma=ppo.gamma)
            case "reinforce" | "reinforce_pp":
                advantages = reward_to_go(rewards, mask, gamma=ppo.gamma)
            case "rloo":
                advantages = spread(groups.rloo(returns, numbers), mask)
            case "grpo":
                advantages = spread(groups.grpo(returns, numbers), mask)
            case "dr_grpo" | "reinforce_pp_baseline":
                advantages = spread(groups.centred(returns, numbers), mask)
            case "remax":
                assert baseline is not None, "ReMax needs the likeliest responses' rewards"
                advantages = spread(groups.remax(returns, baseline), mask)
            case _:
                assert_never(ppo.advantage)
        match ppo.whiten:
            case "batch":
                advantages = whiten(advantages, mask)
            case "group":
                advantages = whiten_by_group(advantages, mask, numbers)
            case "none":
                pass
            case _:
                assert_never(ppo.whiten)
        return advantages, targets

    def values_of(self, outputs: Tensor) -> Tensor:
        """What the critic says, in units of reward."""
        if not self.ppo.value_norm or not self.value_norm.count:
            return outputs
        return outputs * self.value_norm.std + self.value_norm.mean

    def critic_targets(self, returns: Tensor, outputs: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Returns and old values in the critic's own units, (B, T); the norm learns from these returns first."""
        if not self.ppo.value_norm:
            return returns, outputs
        values = self.values_of(outputs)
        self.value_norm = self.value_norm.updated(returns[mask])
        normalise = self.value_norm.normalise
        return normalise(returns, None, least_std=1e-3), normalise(values, None, least_std=1e-3)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it."""
        return {"reward_norm": asdict(self.reward_norm), "value_norm": asdict(self.value_norm)}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a checkpoint's."""
        self.reward_norm, self.value_norm = RunningNorm(**state["reward_norm"]), RunningNorm(**state["value_norm"])

    def _penalised(self, shaped: Tensor, responses: Responses) -> Tensor:
        ppo = self.ppo
        if ppo.reward_norm != "none" and ppo.reward_clip is not None:
            shaped = shaped.clamp(-ppo.reward_clip, ppo.reward_clip)
        shaped = end_penalty(shaped, responses.finished, ppo.missing_end_penalty)
        if ppo.overlong_buffer:
            over = overlong_penalty(responses.lengths, longest=self.longest, buffer=ppo.overlong_buffer)
            shaped = shaped - ppo.overlong_penalty * over
        return shaped - ppo.length_penalty * responses.lengths
