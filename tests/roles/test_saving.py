"""A checkpoint is written behind the learner's back, and nothing that goes wrong there stays there."""

import threading
import time
from pathlib import Path

import pytest
import torch

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.models.checkpoint import newest_valid
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.saving import BackgroundWriter
from rlhf_ray.types import Scored
from tests.models.tiny import make_policy_folder
from tests.roles.test_learner import make_rollouts, small


def refuse() -> None:
    raise OSError("No space left on device")


def stumble() -> None:
    raise KeyError("a bug of ours")


def test_a_write_is_begun_and_not_waited_for() -> None:
    writer, go = BackgroundWriter(deadline_s=5), threading.Event()
    began = time.monotonic()
    assert writer.begin(lambda: go.wait(5)) is None
    assert time.monotonic() - began < 1
    go.set()
    assert writer.finish() is None


def test_the_next_write_waits_for_the_one_before() -> None:
    writer, order = BackgroundWriter(deadline_s=5), []
    writer.begin(lambda: (time.sleep(0.2), order.append("first")))
    writer.begin(lambda: order.append("second"))
    writer.finish()
    assert order == ["first", "second"]


def test_what_the_disk_refused_is_said_once_and_the_next_write_goes_on() -> None:
    writer, written = BackgroundWriter(deadline_s=5), []
    writer.begin(refuse)
    assert writer.begin(lambda: written.append(1)) == "No space left on device"
    assert writer.finish() is None
    assert written == [1]


def test_any_other_failure_is_raised() -> None:
    writer = BackgroundWriter(deadline_s=5)
    writer.begin(stumble)
    with pytest.raises(KeyError, match="a bug of ours"):
        writer.finish()


def test_a_disk_that_hangs_is_not_waited_for_without_end() -> None:
    writer, go = BackgroundWriter(deadline_s=0.1), threading.Event()
    writer.begin(lambda: go.wait(10))
    with pytest.raises(InfrastructureError, match=r"0\.1 s: is the disk of run\.root stuck"):
        writer.finish()
    go.set()


def test_a_checkpoint_holds_what_was_learnt_when_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Learner.from_folder(make_policy_folder(tmp_path / "base"), small())
    rollouts = make_rollouts(learner)
    before = {name: tensor.clone() for name, tensor in learner.networks.policy.state_dict().items()}
    go, begin = threading.Event(), BackgroundWriter.begin
    monkeypatch.setattr(BackgroundWriter, "begin", lambda self, write: begin(self, lambda: (go.wait(20), write())))
    learner.save(tmp_path / "checkpoints", 0)
    learner.update(learner.prepare(Scored(rollouts, [float(i) for i in range(8)])))  # in place
    go.set()
    assert learner.finish_saving() is None
    checkpoint = newest_valid(tmp_path / "checkpoints")
    assert checkpoint is not None
    assert all(torch.equal(checkpoint.tensors["policy"][name], tensor) for name, tensor in before.items())
    assert checkpoint.state["weights_step"] == 0
