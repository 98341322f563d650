"""A small stand-in for a model, of the same architecture, on which one may try what holds for the architecture.

What is asked of it, rounding would hide in half precision and a model that is spread over ranks could not answer alone.
"""

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

VOCABULARY = 64
SPREAD = 0.2
"""Standard deviation of its weights: large enough for attention to tell tokens apart."""


def twin_of(model: PreTrainedModel) -> PreTrainedModel:
    """In float32 on the CPU: the model's own class and widths, a layer of each kind that it has, at least two.

    Raises what the class does where it cannot be made smaller.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    text = config.get_text_config()
    _cut_layers(text)
    text.vocab_size = VOCABULARY
    for part in (config, text):
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            setattr(part, name, None)
        if hasattr(part, "initializer_range"):
            part.initializer_range = SPREAD
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        twin: PreTrainedModel = type(model)(config)
    return twin.float().eval()


def _cut_layers(text: Any) -> None:
    depth = text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [None] * depth
    kept = min(depth, max(2, 1 + max(kinds.index(kind) for kind in set(kinds))))
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(text, name, value[:kept])
    text.num_hidden_layers = kept
