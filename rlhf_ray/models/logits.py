"""A language model in two halves, hidden states and the head over the vocabulary: logits are made a few at a time.

The (B, T, V) logits of a batch are by far its largest tensor: 4 bytes times 128,000 words a token. Whoever asks for
log-probs wants one number a token.
"""

from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from rlhf_ray.models.packing import is_packed, run_packed
from rlhf_ray.models.twin import twin_of


def outputs(model: Any, ids: Tensor, attention: Tensor) -> Tensor:
    """(B, L, ...) the logits of a model as a whole; ids, attention: (B, L)."""
    plain = plain_of(model)
    if is_packed(plain):
        return run_packed(model, ids, attention, "logits")
    logits: Tensor = model(input_ids=ids, attention_mask=attention, use_cache=False).logits
    return logits


def hidden_states(model: Any, ids: Tensor, attention: Tensor) -> Tensor:
    """(B, L, H) what the head reads; ids, attention: (B, L)."""
    plain = plain_of(model)
    if is_packed(plain):
        return run_packed(plain.base_model, ids, attention, "last_hidden_state")
    hidden: Tensor = plain.base_model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state
    return hidden


def logits_from(model: Any, hidden: Tensor) -> Tensor:
    """(..., V) from (..., H), as the model's own forward pass makes them: `head_is_known` says for which models."""
    plain = plain_of(model)
    logits: Tensor = plain.get_output_embeddings()(hidden)
    config = plain.config
    if getattr(config, "logits_scaling", None):  # Granite
        logits = logits / config.logits_scaling
    if getattr(config, "logit_scale", None):  # Cohere
        logits = logits * config.logit_scale
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2 and 3
    return logits if not cap else cap * torch.tanh(logits / cap)


@torch.no_grad()
def head_is_known(model: Any) -> bool:
    """Whether the two halves make the model's own logits; an architecture with more behind its head is asked whole."""
    try:
        twin = twin_of(plain_of(model))
        ids = torch.arange(8).unsqueeze(0)
        attention = torch.ones_like(ids)
        halves, whole = logits_from(twin, hidden_states(twin, ids, attention)), outputs(twin, ids, attention)
    except (AttributeError, TypeError, ValueError, KeyError, RuntimeError):
        return False
    return halves.shape == whole.shape and torch.allclose(halves, whole, rtol=1e-4, atol=1e-5)


def plain_of(model: Any) -> Any:
    """The model itself, where an adapter has been put on it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
