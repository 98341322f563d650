"""Weights from GPU memory to GPU memory, between two processes."""

from typing import Any

import pytest
import torch
from torch import multiprocessing as mp

from rlhf_ray.transport.intake import Intake
from rlhf_ray.transport.parcels import Receiver
from rlhf_ray.transport.sending import Sender
from rlhf_ray.transport.transports import make_transport
from tests.roles.fakes import LocalPush

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    pytest.mark.timeout(300),
]


def weights(step: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(step)
    shapes = {"a": (300, 7), "b": (5,), "c": ()}
    return {name: torch.randn(shape, generator=draw).bfloat16() for name, shape in shapes.items()}


def receive(parcels: Any, answers: Any, device: int) -> None:
    intake, found = Intake(Receiver("there", device=torch.device("cuda", device))), dict[str, torch.Tensor]()
    while (parcel := parcels.get(timeout=120)) is not None:
        found |= {name: tensor.clone() for name, tensor in intake.take(parcel)}
        if parcel.last:
            torch.cuda.synchronize(device)
            right = all(torch.equal(found[name].cpu(), tensor) for name, tensor in weights(parcel.weights_step).items())
            answers.put((intake.sha256(), right))


@pytest.mark.parametrize("name", ["cuda_ipc", "nccl", "gloo", "object_store"])
def test_what_arrives_on_the_gpu_is_what_was_sent_hand_over_after_hand_over(name: Any) -> None:
    receiver = 1 if name == "nccl" else 0
    if torch.cuda.device_count() <= receiver:
        pytest.skip("nccl takes two GPUs")
    spawning = mp.get_context("spawn")
    parcels, answers = spawning.Queue(), spawning.Queue()
    process = spawning.Process(target=receive, args=(parcels, answers, receiver))
    process.start()
    sender = Sender(make_transport(name, host="127.0.0.1", deadline_s=60), parcel_bytes=1024)
    try:
        for step in range(3):
            on_gpu = [(key, tensor.cuda(0)) for key, tensor in weights(step).items()]
            push = LocalPush(sender.send(on_gpu, ["there"], weights_step=step))
            for parcel in push:
                parcels.put(parcel)
            assert answers.get(timeout=120) == (push.sent.sha256, True)
    finally:
        parcels.put(None)
        process.join(60)
        process.kill()
