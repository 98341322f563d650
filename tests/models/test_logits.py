"""A language model in two halves says what it says whole."""

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
)

from rlhf_ray.config import LoRAConfig
from rlhf_ray.models.logits import head_is_known, hidden_states, logits_from
from rlhf_ray.models.lora import with_adapter

SIZE: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE, tie_word_embeddings=True),
    "gpt_neox": GPTNeoXConfig(**{k: v for k, v in SIZE.items() if k != "num_key_value_heads"}),
    "gpt2": GPT2Config(vocab_size=50, n_embd=32, n_layer=2, n_head=2),
    "gemma2, a cap on its logits": Gemma2Config(**SIZE, head_dim=16, final_logit_softcapping=0.2),
    "granite, logits scaled down": GraniteConfig(**SIZE, logits_scaling=4.0),
    "cohere, logits scaled": CohereConfig(**SIZE, logit_scale=0.3),
}


def make(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family]).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_halves_of_every_family_make_its_own_logits(family: str) -> None:
    model = make(family)
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 0]])
    attention = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]])
    assert head_is_known(model)
    with torch.no_grad():
        halves = logits_from(model, hidden_states(model, ids, attention))
        whole = model(ids, attention_mask=attention).logits
    assert torch.allclose(halves[attention.bool()], whole[attention.bool()], atol=1e-5)


def test_an_adapter_is_in_both_halves() -> None:
    model = with_adapter(make("llama"), LoRAConfig(rank=4), use="policy", seed=0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    assert head_is_known(model)


class Biased(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        said = super().forward(*args, **kwargs)
        said.logits = said.logits + torch.arange(said.logits.shape[-1]) / 50
        return said


def test_a_model_with_more_behind_its_head_is_found_out() -> None:
    assert not head_is_known(Biased(LlamaConfig(**SIZE)))
