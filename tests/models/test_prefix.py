"""A model says of what follows a prefix what it says of the whole, and says where it cannot."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, Gemma2Config, PretrainedConfig

from rlhf_ray.models.prefix import can_go_on, common_prefix, logits_after
from tests.models.test_packing import FAMILIES, PLAIN, SIZE

PREFIX = [7, 8, 9, 10, 11, 12]  # longer than the shortest window among them
LENGTHS = [5, 1, 3]


def make(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    config = copy.deepcopy(config)
    config.num_labels, config.pad_token_id = 1, 0
    return AutoModelForSequenceClassification.from_config(config).eval()


CLASSIFIERS = {name: config for name, config in FAMILIES.items() if name != "cohere"} | {
    "gemma2, which caps its attention": Gemma2Config(**SIZE, head_dim=8, sliding_window=4)
}


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_every_familys_scores_stay_the_same(family: str) -> None:
    model = make(CLASSIFIERS[family])
    assert can_go_on(model)
    rest = torch.randint(2, 60, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    attention = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    rest *= attention
    before = torch.tensor([PREFIX] * len(LENGTHS))
    with torch.inference_mode():
        whole = model(
            input_ids=torch.cat([before, rest], dim=1),
            attention_mask=torch.cat([before.clamp(max=1), attention], dim=1),
        ).logits
        after = logits_after(model, PREFIX, {"input_ids": rest, "attention_mask": attention})
    assert whole.std() > 1e-3
    assert (after - whole).abs().max() < 1e-5 * whole.abs().max()


def test_attention_that_looks_ahead_cannot() -> None:
    assert not can_go_on(make(BertConfig(**PLAIN)))


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[1, 2, 3], [1, 2, 4], [1, 2]], 2),
        ([[5, 1], [5, 9, 9], [5, 3], [5]], 1),
        ([[1, 2], [1, 2]], 2),
        ([[1], [2]], 0),
        ([[1, 2], []], 0),
    ],
)
def test_a_common_prefix_is_what_all_begin_with(rows: list[list[int]], wanted: int) -> None:
    assert common_prefix(rows) == wanted
