"""An adapter that is sent alone and laid over the base is the policy with its adapter merged in."""

from pathlib import Path

import pytest
import torch

from rlhf_ray.config import LoRAConfig
from rlhf_ray.models.lora import adapter_weights, plain_weights, with_adapter
from rlhf_ray.models.policy import load_policy
from rlhf_ray.models.stored import dtypes_of
from rlhf_ray.transport.intake import Intake
from rlhf_ray.transport.object_store import ObjectStore
from rlhf_ray.transport.parcels import Receiver
from rlhf_ray.transport.sending import Sender
from tests.models.tiny import make_policy_folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy_folder(tmp_path_factory.mktemp("adapter") / "policy")


def adapted(base: Path, **config: object):  # type: ignore[no-untyped-def]
    """A policy whose adapter has learnt something."""
    model = with_adapter(load_policy(base), LoRAConfig(rank=2, **config), use="policy", seed=0)  # type: ignore[arg-type]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


@pytest.mark.parametrize("parcel_bytes", [64, 2**20])
def test_a_receiver_puts_the_whole_policy_together(base: Path, parcel_bytes: int) -> None:
    model = adapted(base)
    adapter = adapter_weights(model, dtypes_of(base))
    assert adapter is not None
    intake, found = Intake(Receiver("generator"), base=base), {}
    sent = 0
    for parcel in Sender(ObjectStore(), parcel_bytes=parcel_bytes).send(adapter, [], weights_step=1, over_base=True):
        found = dict(intake.take(parcel))
        assert bool(found) == parcel.last
        sent += sum(piece.bytes for piece in parcel.pieces)
    merged = dict(plain_weights(model))
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, atol=1e-7, rtol=1e-6)
    assert any(not torch.equal(found[name], tensor) for name, tensor in dict(plain_weights(load_policy(base))).items())
    assert sent < sum(tensor.nbytes for tensor in merged.values()) / 4


def test_where_the_folder_does_not_hold_what_the_model_computes_with_the_adapter_is_not_enough(base: Path) -> None:
    stored = dtypes_of(base)
    assert adapter_weights(load_policy(base), stored) is None
    assert adapter_weights(adapted(base), {}) is None
    assert adapter_weights(adapted(base), {**stored, "model.norm.weight": torch.bfloat16}) is None


def test_an_adapter_on_some_layers_leaves_the_others_as_they_are(base: Path) -> None:
    adapter = adapter_weights(adapted(base, targets=("q_proj",)), dtypes_of(base))
    assert adapter is not None
    assert {name.split(".")[-3] for name, _ in adapter} == {"q_proj"}
