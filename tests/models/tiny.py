"""A policy small enough to make anew in each test, and the words it knows."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerBase

from rlhf_ray.config import ModelConfig
from rlhf_ray.models.policy import new_policy, save_policy, train_tokenizer
from rlhf_ray.types import Exchange, Message, Prompt

TEXTS = ["my lamp arrived broken", "my chair never arrived", "we send a new one today", "sorry, we pay you back"] * 8


def make_prompt(text: str = "my lamp arrived broken", **overrides: Any) -> Prompt:
    fields: dict[str, Any] = {"id": text, "messages": (Message("user", text),), "group": text}
    return Prompt(**{**fields, **overrides})


def make_exchange(text: str = "my lamp arrived broken", response: str = "we send a new one today") -> Exchange:
    return Exchange(make_prompt(text), response)


def make_tokenizer(*, vocabulary: int = 300, context: int = 48) -> PreTrainedTokenizerBase:
    return train_tokenizer(TEXTS, vocabulary=vocabulary, context=context)


def make_policy(tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    size = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 48, "context": 48, **overrides}
    return new_policy(ModelConfig(**size), tokenizer, seed=seed)


def make_policy_folder(folder: Path, **size: int) -> Path:
    tokenizer = make_tokenizer(context=size.get("context", 48))
    save_policy(folder, make_policy(tokenizer, **size), tokenizer)
    return folder


def new_experts(vocabulary: int, end_id: int) -> MixtralForCausalLM:
    """A mixture of experts, which transformers keeps fused in memory and one by one on the disk."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocabulary, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
        initializer_range=0.125, eos_token_id=end_id, sliding_window=None,
    )  # fmt: skip
    return MixtralForCausalLM(config).eval()
