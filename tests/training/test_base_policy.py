"""The base policy, and the model that it was before it imitated anybody."""

import json
from pathlib import Path

import pytest
import torch

from rlhf_ray.config import load_config
from rlhf_ray.models.policy import load_policy
from rlhf_ray.training.base_policy import make_base_policy

SMALL = ["model={vocabulary: 300, context: 128, hidden: 32, intermediate: 64, layers: 1, heads: 1}"]
A_MOMENT = ["pretrain.max_epochs=0.1", "sft={max_epochs: 1, batch_size: 4}"]


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    rows = [{"prompt": f"Question {n}?", "chosen": "Yes, please.", "rejected": "No."} for n in range(24)]
    (tmp_path / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = f"data={{path: {tmp_path / 'choices.jsonl'}, format: preference, held_out: 4}}"
    return ["recipe=preferences", data, *SMALL, *A_MOMENT]


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in load_policy(folder).parameters()])


def make(folder: Path, settings: list[str]) -> Path:
    make_base_policy(load_config(None, settings), folder / "base", pretrained=folder / "before", say=lambda _: None)
    return folder


def test_what_it_was_before_it_imitated_judged_answers_is_kept(tmp_path: Path, settings: list[str]) -> None:
    both = make(tmp_path / "both", settings)
    unled = make(tmp_path / "unled", [*settings, "sft.max_epochs=0"])
    assert torch.equal(weights(both / "before"), weights(unled / "base"))
    assert not torch.equal(weights(both / "before"), weights(both / "base"))
    assert not (unled / "before").exists()  # the base policy is that model


def test_a_model_of_the_users_is_its_own_before(tmp_path: Path, settings: list[str]) -> None:
    theirs = make(tmp_path / "theirs", [*settings, "sft.max_epochs=0"]) / "base"
    taught = make(tmp_path / "taught", [*settings, f"model.path={theirs}"])
    assert not torch.equal(weights(theirs), weights(taught / "base"))
    assert not (taught / "before").exists()
