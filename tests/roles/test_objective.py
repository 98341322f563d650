import pytest
import torch

from rlhf_ray.algo import losses
from rlhf_ray.config import load_config
from rlhf_ray.roles.objective import policy_token_loss

NEW = torch.tensor([[0.5, -0.5, 0.1]])
OLD = torch.zeros(1, 3)
ADVANTAGES = torch.tensor([[1.0, -1.0, 2.0]])
MASK = torch.ones(1, 3, dtype=torch.bool)
BATCH = (NEW, OLD, ADVANTAGES, MASK)


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ([], losses.clip_loss(*BATCH, low=0.2, high=0.2)),
        (["ppo.clip_high=0.3"], losses.clip_loss(*BATCH, low=0.2, high=0.3)),
        (["ppo.loss=dual_clip", "ppo.dual_clip=1.2"], losses.dual_clip_loss(*BATCH, low=0.2, high=0.2, dual=1.2)),
        (["ppo.loss=gspo"], losses.gspo_loss(*BATCH, low=3e-4, high=4e-4)),
        (["ppo.loss=cispo"], losses.cispo_loss(*BATCH, high=5.0)),
        (["ppo.loss=reinforce"], losses.reinforce_loss(NEW, ADVANTAGES, MASK)),
    ],
)
def test_each_word_chooses_its_formula(settings: list[str], wanted: losses.TokenLoss) -> None:
    found = policy_token_loss(load_config(None, settings).ppo, *BATCH)
    assert torch.equal(found.loss, wanted.loss)
    assert torch.equal(found.clipped, wanted.clipped)
