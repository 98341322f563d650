"""LoRA: a network learns through small matrices beside its own, which stay as they are (Hu et al. 2021,
arXiv:2106.09685). By `peft`; what leaves this file is a plain model again.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from rlhf_ray.config import LoRAConfig
from rlhf_ray.errors import ConfigError
from rlhf_ray.models.critic import HEADS
from rlhf_ray.models.stored import LORA_A, LORA_B, LORA_SCALE

ADAPTER = "default"
_TASKS = {"policy": TaskType.CAUSAL_LM, "critic": TaskType.TOKEN_CLS, "reward_model": TaskType.SEQ_CLS}


def with_adapter(
    model: PreTrainedModel, config: LoRAConfig, *, use: Literal["policy", "critic", "reward_model"], seed: int
) -> Any:
    """The model with an adapter that changes nothing yet; only it learns, and a head. `rank` 0: as it was.

    `ConfigError` where the model has no layer of the names in `targets`.
    """
    if not config.rank:
        return model
    wanted = LoraConfig(
        task_type=_TASKS[use],
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets) or "all-linear",
        lora_dropout=0.0,  # log-probs have to be the same twice
        exclude_modules=None if use == "policy" else list(HEADS),  # a head learns whole
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted: PeftModel = get_peft_model(model, wanted)
        except ValueError as error:
            raise ConfigError(f"lora.targets={list(config.targets)}: {str(error).splitlines()[0]}") from None
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False  # autocast casts the adapter's small matrices, not what they read
    return adapted


def four_bits(dtype: torch.dtype) -> dict[str, Any]:
    """`from_pretrained`'s options for a base in 4 bits that is computed in `dtype`: QLoRA (Dettmers et al. 2023,
    arXiv:2305.14314). `ConfigError` without bitsandbytes.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError("lora.quantised needs bitsandbytes: pip install 'rlhf-ray[quantised]'")
    quantised = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["lm_head", *HEADS],
    )
    return {"quantization_config": quantised, "device_map": {"": "cuda" if torch.cuda.is_available() else "cpu"}}


def without_adapter(model: Any) -> AbstractContextManager[Any]:
    """In here the model is the one that the adapter was put on."""
    off: AbstractContextManager[Any] = model.disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    return off


def with_adapter_merged(model: PeftModel) -> PreTrainedModel:
    """A plain model whose weights have taken in what the adapter learnt."""
    merged: PreTrainedModel = model.merge_and_unload()
    return merged


def without_adapter_for_good(model: PeftModel) -> PreTrainedModel:
    """The model that the adapter was put on; the adapter is gone."""
    base: PreTrainedModel = model.unload()
    return base


def plain_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The state dict of a plain model, weight by weight under its own names, what the adapter has learnt added in."""
    if not isinstance(model, PeftModel):
        yield from model.state_dict().items()
        return
    base = model.get_base_model()
    learnt = _adapted(base)
    for inner, tensor in base.state_dict().items():
        name = inner.replace(".base_layer", "")
        weight, beside, _ = name.partition(".weight.")
        if name in learnt:
            layer = learnt[name]
            # half precision would round away what was learnt beside a weight that is a hundred times as large
            own = _unquantised(getattr(layer.get_base_layer(), name.rpartition(".")[2])).float()
            yield name, own + layer.get_delta_weight(ADAPTER)
        elif ".lora_" not in inner and not (beside and f"{weight}.weight" in learnt):  # what its quantisation keeps
            yield name, tensor


def _adapted(base: nn.Module) -> dict[str, Any]:
    """What adapts each weight, by the weight's own name; experts are wrapped one parameter around the other."""
    return {
        f"{name.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}": module
        for name, module in base.named_modules()
        if isinstance(module, LoraLayer)
    }


def adapter_weights(model: Any, stored: Mapping[str, torch.dtype]) -> Iterator[tuple[str, Tensor]] | None:
    """What an adapter has learnt, which `stored.laid_over` adds to the folder that the model was loaded from.

    None where the folder's weights (`stored`: their names and dtypes) are not the numbers that the model computes with,
    as in 4 bits, or where it names them otherwise.
    """
    if not isinstance(model, PeftModel):
        return None
    base = model.get_base_model()
    learnt, state = _adapted(base), base.state_dict()
    own = {name.replace(".base_layer", ""): tensor for name, tensor in state.items() if ".lora_" not in name}
    linear = all(isinstance(layer.get_base_layer(), nn.Linear) for layer in learnt.values())
    if not linear or any(stored.get(name) != tensor.dtype for name, tensor in own.items()):
        return None
    return _parts(learnt)


def _parts(learnt: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, layer in learnt.items():
        yield name + LORA_A, layer.lora_A[ADAPTER].weight.detach()
        yield name + LORA_B, layer.lora_B[ADAPTER].weight.detach()
        yield name + LORA_SCALE, torch.tensor(float(layer.scaling[ADAPTER]))


def _unquantised(weight: Any) -> Tensor:
    """The numbers that a layer computes with, be they kept in 4 bits or as they are."""
    state = getattr(weight, "quant_state", None)
    if state is None:
        plain: Tensor = weight.detach()
        return plain
    from bitsandbytes.functional import dequantize_4bit

    numbers: Tensor = dequantize_4bit(weight.detach(), state)
    return numbers


def learnt_weights(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint keeps: everything, or with an adapter what learns."""
    if not isinstance(model, PeftModel):
        return model.state_dict()
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_learnt_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Takes them over; each has to be there."""
    if not isinstance(model, PeftModel):
        model.load_state_dict(weights)
        return
    assert weights.keys() == learnt_weights(model).keys(), "the adapter's weights are not those of this model"
    model.load_state_dict(weights, strict=False)
