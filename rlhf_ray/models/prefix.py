"""What texts have in common at their beginning, read once for all of them: the prompt that many answers answer.

A causal model's keys and values of a token depend on nothing behind it, so those of a common prefix serve each text.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_ray.models.twin import VOCABULARY, twin_of


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """How many tokens all of them begin with."""
    ordered = [tuple(row) for row in rows]
    first, last = min(ordered), max(ordered)  # what lies between them in the order of dictionaries begins as both do
    shorter = min(len(first), len(last))
    return next((i for i in range(shorter) if first[i] != last[i]), shorter)


def logits_after(model: PreTrainedModel, prefix: Sequence[int], batch: Mapping[str, Tensor]) -> Tensor:
    """(B, labels) what a classifier says of texts that go on where `prefix` ends: what it says of the whole texts.

    batch: `input_ids` and `attention_mask`, each (B, L), of what follows, padded on the right.
    """
    ids = batch["input_ids"]
    begun = model.base_model(input_ids=torch.tensor([prefix], device=ids.device), use_cache=True).past_key_values
    begun.batch_repeat_interleave(len(ids))
    mask = torch.cat([ids.new_ones(len(ids), len(prefix)), batch["attention_mask"]], dim=1)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=begun).logits
    return logits


@torch.no_grad()
def can_go_on(model: PreTrainedModel) -> bool:
    """Whether `logits_after` holds for this architecture, tried on a twin: not where attention looks ahead."""
    try:
        twin, pad_id = twin_of(model), VOCABULARY - 1
        for part in (twin.config, twin.config.get_text_config()):
            part.pad_token_id = pad_id
        ids = torch.arange(24).view(2, 12)
        ids[1, :8], ids[1, 10:] = ids[0, :8], pad_id
        attention = (ids != pad_id).long()
        whole = twin(input_ids=ids, attention_mask=attention).logits
        rest = {"input_ids": ids[:, 8:], "attention_mask": attention[:, 8:]}
        after = logits_after(twin, ids[0, :8].tolist(), rest)
    except (TypeError, ValueError, AttributeError, KeyError, RuntimeError):
        return False
    return torch.allclose(after, whole, rtol=1e-4, atol=1e-5)
