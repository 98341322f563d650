"""What is written weight by weight is what `save_pretrained` would have written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from rlhf_ray.models import export
from rlhf_ray.models.export import save_streamed
from rlhf_ray.models.policy import load_policy, save_policy
from tests.models.tiny import make_policy, make_tokenizer

TOKENIZER = make_tokenizer()


def make_mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=len(TOKENIZER), num_key_value_heads=1, num_local_experts=4, **size)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["tied", "experts, fused in memory"])
def test_a_folder_holds_the_same_files_and_the_same_weights(tmp_path: Path, kind: str) -> None:
    model = make_policy(TOKENIZER) if kind == "tied" else make_mixtral()
    save_policy(tmp_path / "at_once", model, TOKENIZER)
    save_streamed(tmp_path / "streamed", model, model.state_dict().items(), TOKENIZER)
    folders = [tmp_path / "at_once", tmp_path / "streamed"]
    assert len({frozenset(path.name for path in folder.iterdir()) for folder in folders}) == 1
    ours, theirs = (load_file(folder / "model.safetensors") for folder in folders)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    configs = [json.loads((folder / "config.json").read_text()) for folder in folders]
    assert configs[0] == configs[1]


def test_a_large_model_is_several_files_and_never_more_than_one_of_them_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_policy(TOKENIZER, layers=4)
    largest = max(tensor.nbytes for tensor in model.state_dict().values())
    monkeypatch.setattr(export, "FILE_BYTES", largest)
    saved: list[int] = []
    save_file = export.save_file

    def watched(tensors: dict[str, torch.Tensor], path: Path, **options: object) -> None:
        saved.append(sum(tensor.nbytes for tensor in tensors.values()))
        save_file(tensors, path, **options)

    monkeypatch.setattr(export, "save_file", watched)
    save_streamed(tmp_path / "policy", model, model.state_dict().items(), TOKENIZER)
    assert len(saved) > 3
    assert max(saved) <= largest
    assert {path.name for path in (tmp_path / "policy").glob("*.safetensors")} == {
        f"model-{number:05d}-of-{len(saved):05d}.safetensors" for number in range(1, len(saved) + 1)
    }
    loaded = load_policy(tmp_path / "policy").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
