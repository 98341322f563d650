"""Weights as they lie in a Hugging Face folder, one at a time."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

HEAD = "lm_head.weight"
EMBEDDING = "embed_tokens.weight"
LORA_A, LORA_B, LORA_SCALE = ".lora_A", ".lora_B", ".lora_scale"
"""What an adapter's parts are called after the weight that they change."""


def weights_of(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every weight of a folder by name.

    A head that is tied to the embedding is not in the files; vLLM keeps one of its own, which would stay stale.
    """
    tied = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("tie_word_embeddings", False)
    embedding: Tensor | None = None
    has_head = False
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in sorted(file.keys()):
                tensor = file.get_tensor(name)
                yield name, tensor
                has_head |= name == HEAD
                embedding = tensor if name.endswith(EMBEDDING) else embedding
    if tied and not has_head and embedding is not None:
        yield HEAD, embedding


def shapes_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight, read from the files' headers alone."""
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def dtypes_of(folder: Path) -> dict[str, torch.dtype]:
    """Name and number format of every weight, with a tied head's."""
    return {name: tensor.dtype for name, tensor in weights_of(folder)}


def laid_over(folder: Path, adapter: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The folder's weights, to which an adapter adds what it has learnt: W + scale B A (`lora.adapter_weights`)."""
    for name, weight in weights_of(folder):
        if name + LORA_A not in adapter:
            yield name, weight
            continue
        a, b, scale = (adapter[name + part] for part in (LORA_A, LORA_B, LORA_SCALE))
        yield name, weight.float() + (b @ a).to(weight.device) * scale.to(weight.device)
