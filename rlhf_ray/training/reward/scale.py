"""How loud a reward model's scores may be: as loud as choices bear out that taught it nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from rlhf_ray.algo.ranking import Slope, slope_of
from rlhf_ray.data.judgements import Judgements, comparisons, matched
from rlhf_ray.models.reward import RewardModel
from rlhf_ray.types import Exchange

FEW = 10
"""Prompts on which choices, though all were right, say little of a model: where answers to different prompts can be
compared, those are asked instead."""


@dataclass
class Evidence:
    """Pairs of answers of which people found one better, each put to a model that did not learn from it."""

    margins: list[float] = field(default_factory=list)
    """The better one's score less the other's, in standard deviations of that model's scores, so that those of several
    models can stand together."""
    groups: list[str] = field(default_factory=list)
    """Of prompts: what may go together."""
    prompts: set[str] = field(default_factory=set)

    def add(self, pairs: Sequence[tuple[Exchange, Exchange]], *, reward_model: RewardModel, std: float) -> None:
        """Puts (better, worse) to a model whose scores have that standard deviation."""
        answers = list(dict.fromkeys(answer for pair in pairs for answer in pair))
        score = dict(zip(answers, reward_model.score(answers), strict=True))
        self.margins += [(score[better] - score[worse]) / std for better, worse in pairs]
        self.groups += [better.prompt.group for better, _ in pairs]
        self.prompts |= {better.prompt.id for better, _ in pairs}


@dataclass
class Unseen:
    """What models make of judgements that they did not learn from."""

    within: Evidence = field(default_factory=Evidence)
    """Of answers to one prompt, which is what a reward is for."""
    across: Evidence = field(default_factory=Evidence)
    """Of answers to different prompts, by their ratings and thumbs."""

    def ask(
        self, reward_model: RewardModel, part: Judgements, *, said: Judgements, exchanges: Sequence[Exchange]
    ) -> None:
        """Puts a part of the feedback to a model whose scores of `exchanges` say what a standard deviation is; where it
        compares nothing, what else was `said` of its groups.
        """
        std = torch.tensor(reward_model.score(exchanges)).std(correction=0).clamp(min=1e-6).item()
        groups = {item.prompt.group for item in part}
        besides = [item for item in said if item.prompt.group in groups]
        choices = [
            (Exchange(choice.prompt, choice.better), Exchange(choice.prompt, choice.worse))
            for choice in comparisons(part) or comparisons(besides)
        ]
        self.within.add(choices, reward_model=reward_model, std=std)
        self.across.add(matched(part) or matched(besides), reward_model=reward_model, std=std)

    @property
    def best(self) -> Evidence:
        """What tells more of how loud rewards may be."""
        return self.across if self.across.margins and len(self.within.prompts) < FEW else self.within

    def slope(self) -> Slope | None:
        """Log-odds a standard deviation, as `best` has it; None without any pairs."""
        return slope_of(self.best.margins, self.best.groups) if self.best.margins else None


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
        "confirmed_by": {
            "choices": len(unseen.best.margins),
            "prompts": len(unseen.best.prompts),
            "across_prompts": unseen.best is unseen.across,
        },
        "temperature": std / slope.value if slope and slope.value > 0 else None,
    }
