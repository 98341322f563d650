"""What is read from a folder is the whole model, and its hash says exactly what it was."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_ray.errors import ModelError
from rlhf_ray.models.policy import load_policy
from rlhf_ray.models.stored import shapes_of, weights_of
from rlhf_ray.serving.worker import FolderLoader, digest_of
from tests.models.tiny import make_policy_folder


class RecordingWorker(FolderLoader):
    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}
        self.model_runner = SimpleNamespace(get_model=torch.nn.Module)

    def reload_weights(self, *, weights_iterator: Iterator[tuple[str, Tensor]]) -> None:
        self.weights = dict(weights_iterator)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_policy_folder(tmp_path / "policy")


def change(folder: Path, name: str, value: float) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[name].view(-1)[0] = value
    save_file(weights, path, metadata={"format": "pt"})


def test_every_weight_arrives_and_the_tied_head_with_them(folder: Path) -> None:
    worker = RecordingWorker()
    worker.load_folder(str(folder))
    expected = load_policy(folder).state_dict()
    assert worker.weights.keys() == expected.keys()
    assert "lm_head.weight" in worker.weights
    assert all(torch.equal(worker.weights[name], expected[name]) for name in expected)


def test_what_was_loaded_has_the_hash_of_the_folder(folder: Path) -> None:
    assert RecordingWorker().load_folder(str(folder)) == digest_of(folder)


def test_one_changed_number_changes_the_hash(folder: Path) -> None:
    before = digest_of(folder)
    change(folder, "model.norm.weight", 3.0)
    assert digest_of(folder) != before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused_by_name(folder: Path, value: float) -> None:
    change(folder, "model.norm.weight", value)
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        digest_of(folder)


def test_shapes_are_those_of_the_weights_in_the_files(folder: Path) -> None:
    weights = {name: tuple(tensor.shape) for name, tensor in weights_of(folder) if name != "lm_head.weight"}
    assert shapes_of(folder) == weights
