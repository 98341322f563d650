"""A plain Hugging Face folder written weight by weight, so that nobody holds the whole of a large model."""

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.core_model_loading import revert_weight_conversion

from rlhf_ray.models.folder import save_folder

FILE_BYTES = 2**32
"""What one file holds at most, and with it what is in memory at once; a larger weight makes a file of its own."""


def save_streamed(
    folder: Path,
    model: PreTrainedModel,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """A folder as `policy.save_policy` writes it; the model's weights come by their names in it, whole, in float32.

    Architectures that keep their weights in another form in memory than on disk (experts, say) are put together first.
    """
    save_folder(folder, _Streamed(model, weights), tokenizer)


class _Streamed:
    def __init__(self, model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model = model
        tied = set(model.all_tied_weights_keys)
        self.weights = ((name, tensor.detach().float().cpu()) for name, tensor in weights if name not in tied)

    def save_pretrained(self, save_directory: str, /) -> None:
        """Config, generation config and weights."""
        folder = Path(save_directory)
        config = copy.deepcopy(self.model.config)
        config.dtype = "float32"
        config.architectures = [type(self.model).__name__.removeprefix("FSDP")]
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are what was computed with
        config.save_pretrained(save_directory)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(save_directory)
        weights = as_on_disk(self.model, self.weights)
        files = [_write(folder, number, tensors) for number, tensors in enumerate(_grouped(weights), 1)]
        _name(folder, files)


def as_on_disk(model: PreTrainedModel, weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """A model's weights, which come by their names in it, under the names and in the form that its files have.

    They come as they are asked for, unless the architecture keeps them in another form in memory (fused experts, say).
    """
    named = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    if revert_weight_conversion(model, dict(named)).keys() == named.keys():
        return weights
    converted: dict[str, Tensor] = revert_weight_conversion(model, dict(weights))
    return converted.items()


def _grouped(weights: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Weights for one file each."""
    group: dict[str, Tensor] = {}
    for name, tensor in weights:
        if group and sum(held.nbytes for held in group.values()) + tensor.nbytes > FILE_BYTES:
            yield group
            group = {}
        group[name] = tensor.contiguous()
    yield group


def _write(folder: Path, number: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
    path = folder / f"part-{number:05d}.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    return {"path": path, "names": list(tensors), "bytes": sum(tensor.nbytes for tensor in tensors.values())}


def _name(folder: Path, files: list[dict[str, Any]]) -> None:
    """The names that every loader knows, now that it is known how many files there are; and their index."""
    if len(files) == 1:
        files[0]["path"].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(files, 1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        file["path"].rename(folder / name)
        weight_map |= dict.fromkeys(file["names"], name)
    index = {"metadata": {"total_size": sum(file["bytes"] for file in files)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True))
