"""Reward models that were learnt alike, each a little otherwise: their mean is the reward, their spread its doubt."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import torch

from rlhf_ray.models.files import members_of
from rlhf_ray.models.reward import RewardModel, load_reward_model
from rlhf_ray.models.sureness import Considered, agreed
from rlhf_ray.types import Exchange


class Ensemble:
    """One reward model, or several whose tokenizers render alike."""

    def __init__(self, members: Sequence[RewardModel]) -> None:
        """members: one at least."""
        assert members
        self.members = list(members)

    def score(self, exchanges: Sequence[Exchange]) -> list[float]:
        """The mean of their rewards, in the exchanges' order."""
        columns = [member.score(exchanges) for member in self.members]
        return [sum(row) / len(row) for row in zip(*columns, strict=True)]

    def consider_texts(self, texts: Sequence[str], prompts: Sequence[Hashable] = ()) -> Considered:
        """What they make together of texts as `RewardModel.score_texts` reads them: see `agreed`."""
        return agreed([member.consider_texts(texts, prompts) for member in self.members])

    def opinions(self, exchanges: Sequence[Exchange]) -> torch.Tensor:
        """(B, K) what each member, or each head of a single one, makes of each exchange beyond its mean."""
        if len(self.members) == 1:
            return self.members[0].opinions(exchanges)
        means = torch.tensor([member.mean for member in self.members])
        return torch.tensor([member.score(exchanges) for member in self.members]).T - means


def load_ensemble(path: Path) -> Ensemble:
    """A reward model's folder with all members that it has; `ModelError` as `load_reward_model` raises it."""
    return Ensemble([load_reward_model(member) for member in members_of(path)])
