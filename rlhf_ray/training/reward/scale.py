"""How loud a reward model's scores may be: as loud as choices bear out that taught it nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_ray.algo.ranking import Slope, slope_of
from rlhf_ray.data.judgements import Comparison
from rlhf_ray.models.reward import RewardModel
from rlhf_ray.training.reward.measure import margins_of
from rlhf_ray.types import Exchange


@dataclass
class Unseen:
    """Choices, each put to a model that did not learn from it."""

    margins: list[float] = field(default_factory=list)
    """In standard deviations of that model's scores, so that those of several models can stand together."""
    choices: list[Comparison] = field(default_factory=list)

    def ask(self, reward_model: RewardModel, choices: Sequence[Comparison], *, exchanges: Sequence[Exchange]) -> None:
        """Puts `choices` to a model whose scores of `exchanges` say what a standard deviation is."""
        std = torch.tensor(reward_model.score(exchanges)).std(correction=0).clamp(min=1e-6).item()
        self.margins += [margin / std for margin in margins_of(reward_model, choices)]
        self.choices += choices

    @property
    def prompts(self) -> int:
        """How many the choices are on."""
        return len({choice.prompt.id for choice in self.choices})

    def slope(self) -> Slope | None:
        """Log-odds a standard deviation, as these choices have it; None without choices."""
        return slope_of(self.margins, [choice.prompt.group for choice in self.choices]) if self.margins else None


def standardise(
    reward_model: RewardModel, exchanges: Sequence[Exchange], *, unseen: Unseen, least_std: float
) -> dict[str, Any]:
    """Gives the scores of `exchanges` a known standard deviation and, with a bias, mean 0, by changing the head.

    It is 1, so that a KL weight means the same for every reward model, but never more than twice the log-odds that
    `unseen` choices confirm (`Slope`). A model that learnt from noise says next to nothing then, instead of its noise
    as loud as a good model's word. `least_std` keeps the order of its scores.

    So the plain folder gives those scores to whoever loads it. A decoder's head has no bias, and its mean stays;
    `RewardModel.mean` knows it.
    `logit_scale` turns differences of the new scores into what the loss saw; `temperature` is what those have to be
    divided by to be the log-odds that those choices are likeliest under (Guo et al. 2017, arXiv:1706.04599).
    """
    scores = torch.tensor(reward_model.score(exchanges))
    mean, std = scores.mean().item(), scores.std(correction=0).item()
    slope = unseen.slope()
    wanted = 1.0 if slope is None else min(1.0, max(2 * slope.confirmed, least_std))
    scale = std / wanted if std > 1e-6 else 1.0  # scores that are all the same say nothing, however stretched
    head = reward_model.head
    with torch.no_grad():
        head.weight.div_(scale)
        if head.bias is not None:
            head.bias.sub_(mean).div_(scale)
    reward_model.mean = mean / scale if head.bias is None else 0.0
    return {
        "folded": "scale" if head.bias is None else "scale and shift",
        "logit_scale": scale,
        "score_mean": reward_model.mean,
        "score_std": std / scale,
        "confirmed_std": slope and slope.confirmed,
        "confirmed_by": {"choices": len(unseen.choices), "prompts": unseen.prompts},
        "temperature": std / slope.value if slope and slope.value > 0 else None,
    }
