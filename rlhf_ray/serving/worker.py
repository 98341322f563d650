"""What runs inside vLLM's own process: reading a version's weights from its folder into the engine that is running.

Named to vLLM as `worker_extension_cls`; `collective_rpc("load_folder", ...)` calls it by name, so that no code and no
object has to be sent.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_ray.errors import ModelError
from rlhf_ray.models.stored import weights_of
from rlhf_ray.roles.vllm_worker import forget_packed_experts
from rlhf_ray.serving.orphans import end_with_parent
from rlhf_ray.transport.parcels import take_in


class Worker(Protocol):
    """vLLM's worker, as far as it is called here."""

    model_runner: Any

    def reload_weights(self, *, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        """Replaces the weights in place."""


class FolderLoader:
    """Adds `load_folder` and `end_with_replica` to vLLM's worker."""

    def end_with_replica(self) -> None:
        """From now on this process ends with the one that started it: vLLM's would outlive a killed replica."""
        end_with_parent()

    def load_folder(self: Worker, folder: str) -> str:
        """Replaces all weights by those of the folder; the sha256 of what was given to the engine."""
        sha = hashlib.sha256()
        forget_packed_experts(self.model_runner.get_model())
        self.reload_weights(weights_iterator=hashed(weights_of(Path(folder)), sha))
        return sha.hexdigest()


def digest_of(folder: Path) -> str:
    """What `load_folder` returns where it loads this folder whole; `ModelError` where a weight is not a number."""
    sha = hashlib.sha256()
    for name, tensor in hashed(weights_of(folder), sha):
        if not bool(torch.isfinite(tensor).all()):
            raise ModelError(f"weight {name} of {folder} holds NaN or infinity: publish another version")
    return sha.hexdigest()


def hashed(weights: Iterable[tuple[str, Tensor]], sha: Any) -> Iterator[tuple[str, Tensor]]:
    """The same weights; each goes into the hash before it is handed on."""
    for name, tensor in weights:
        take_in(sha, (name, tensor.contiguous()))
        yield name, tensor
