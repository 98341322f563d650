"""A model says of packed sequences what it says of padded ones, and learns the same from them."""

import copy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    CohereConfig,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from rlhf_ray.models.logits import hidden_states, outputs
from rlhf_ray.models.packing import CannotPack, Packing, is_packed, pack_if_it_can, packed_attention

PLAIN: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
SIZE = {**PLAIN, "num_key_value_heads": 2}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZE),
    "qwen2": Qwen2Config(**SIZE),
    "qwen3": Qwen3Config(**SIZE, head_dim=8),
    "gemma": GemmaConfig(**SIZE, head_dim=8),
    "cohere": CohereConfig(**SIZE),
    "gpt_neox": GPTNeoXConfig(**PLAIN),
    "gpt2, whose places are learnt": GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=2, eos_token_id=1),
    "mixtral, a mixture of experts": MixtralConfig(**SIZE, num_local_experts=4),
    "mistral, whose window is shorter than a sequence": MistralConfig(**SIZE, sliding_window=4),
}
LENGTHS = [9, 1, 14, 2, 9, 5]


def make(config: PretrainedConfig) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def ragged() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(2, 60, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    attention = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return ids * attention, attention


def logits_and_gradient(model: Any, least: int, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, ...]:
    """Of real tokens; the gradient of a sum of squares."""
    monkeypatch.setattr("rlhf_ray.models.packing.LEAST", least)
    ids, attention = ragged()
    logits = outputs(model, ids, attention)[attention.bool()]
    model.zero_grad()
    logits.square().sum().backward()
    return logits.detach(), *[parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("least", [1, 1000], ids=["several rectangles", "one rectangle"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_familys_logits_and_gradient_stay_the_same(
    family: str, least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make(FAMILIES[family])
    wanted = logits_and_gradient(model, least, monkeypatch)
    pack_if_it_can(model)
    assert is_packed(model)
    found = logits_and_gradient(model, least, monkeypatch)
    assert len(found) == len(wanted) > 10
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm() + 1e-7


def test_padding_is_0_and_costs_nothing() -> None:
    model, (ids, attention) = make(FAMILIES["llama"]), ragged()
    pack_if_it_can(model)
    seen = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].shape))
    hidden = hidden_states(model, ids, attention)
    assert seen == [(1, sum(LENGTHS), 32)]
    assert not hidden[attention == 0].any()


@pytest.mark.parametrize(
    "config",
    [Gemma2Config(**SIZE, head_dim=8), BertConfig(**PLAIN)],
    ids=["gemma2 caps its attention", "bert looks ahead"],
)
def test_attention_that_does_something_else_stays_as_it_was(config: PretrainedConfig) -> None:
    model = AutoModel.from_config(config).eval()
    before = model.config._attn_implementation
    pack_if_it_can(model)
    assert not is_packed(model)
    assert model.config._attn_implementation == before


def test_what_is_asked_of_attention_and_not_known_is_refused() -> None:
    packing, x = Packing.of([2, 1], torch.device("cpu")), torch.zeros(1, 1, 3, 4)
    packed_attention(torch.nn.Identity(), x, x, x, packing=packing)
    with pytest.raises(CannotPack, match="s_aux"):
        packed_attention(torch.nn.Identity(), x, x, x, packing=packing, s_aux=x)


def test_a_packed_model_that_is_called_as_if_it_were_not_says_so() -> None:
    model, (ids, attention) = make(FAMILIES["llama"]), ragged()
    pack_if_it_can(model)
    with pytest.raises(AssertionError, match="where its sequences lie"):
        model(input_ids=ids, attention_mask=attention)


def test_tokens_know_their_places() -> None:
    packing = Packing.of([2, 1, 3], torch.device("cpu"))
    assert packing.positions.tolist() == [0, 1, 0, 0, 1, 2]
    assert packing.ends.tolist() == [0, 2, 3, 6]
    assert packing.rectangles == ((3, 3),)
    assert packing.spread.tolist() == [3, 4, 5, 0, 1, 1, 2, 2, 2]  # longest first, its last token on the padding
    assert packing.spread[packing.places].tolist() == [0, 1, 2, 3, 4, 5]
