"""What texts have in common at their beginning, read once for all of them: the prompt that many answers answer.

A causal model's keys and values of a token depend on nothing behind it, so those of a common prefix serve each text.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_ray.models.twin import twin_of


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    ordered = [tuple(row) for row in rows]
    first, last = min(ordered), max(ordered)  # what lies between them in the order of dictionaries begins as both do
    shorter = min(len(first), len(last))
    return next((i for i in range(shorter) if first[i] != last[i]), shorter)


def run_after(model: PreTrainedModel, prefix: Sequence[int], batch: Mapping[str, Tensor], output: str) -> Tensor:
    """What the model says, under the name `output`, of texts that go on where `prefix` ends: as of the whole texts.

    batch: `input_ids` and `attention_mask`, each (B, L), of what follows, padded on the right.
    """
    ids = batch["input_ids"]
    begun = model.base_model(input_ids=torch.tensor([prefix], device=ids.device), use_cache=True).past_key_values
    begun.batch_repeat_interleave(len(ids))
    mask = torch.cat([ids.new_ones(len(ids), len(prefix)), batch["attention_mask"]], dim=1)
    said: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=begun)[output]
    return said


@torch.no_grad()
def can_go_on(model: PreTrainedModel) -> bool:
    """Whether `run_after` holds for this architecture, tried on a twin: not where attention looks ahead."""
    try:
        body = twin_of(model).base_model
        ids = torch.arange(24).view(2, 12)
        ids[1, :8] = ids[0, :8]
        attention = torch.tensor([[1] * 12, [1] * 10 + [0] * 2])
        whole = body(input_ids=ids, attention_mask=attention).last_hidden_state
        rest = {"input_ids": ids[:, 8:], "attention_mask": attention[:, 8:]}
        after = run_after(body, ids[0, :8].tolist(), rest, "last_hidden_state")
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError):
        return False
    inside = attention[:, 8:].bool()
    return torch.allclose(after[inside], whole[:, 8:][inside], rtol=1e-4, atol=1e-5)
