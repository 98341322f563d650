"""Weights through a real gloo group: threads are its processes here; tests/on_ray/test_transport.py has real ones."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Queue

import pytest
import torch
from torch import Tensor

from rlhf_ray.errors import TransferBroken
from rlhf_ray.transport.group import NCCL, Gloo, Meeting
from rlhf_ray.transport.intake import Intake
from rlhf_ray.transport.parcels import Parcel, Receiver, Sent
from rlhf_ray.transport.sending import Sender
from rlhf_ray.transport.transports import make_transport

WEIGHTS = {"a": torch.randn(300), "b": torch.randn(7, 3).bfloat16(), "none": torch.empty(0), "c": torch.tensor(3)}


class Site:
    """A sender and some receivers, each in a thread of its own."""

    def __init__(self, *receivers: Receiver, workers: int = 1, deadline_s: float = 20) -> None:
        self.sender = Sender(Gloo(host="127.0.0.1", workers=workers, deadline_s=deadline_s), parcel_bytes=512)
        self.intakes = {receiver: Intake(receiver) for receiver in receivers}
        self.threads = ThreadPoolExecutor(16)

    def hand_over(self, to: Sequence[str], present: Sequence[Receiver]) -> tuple[Future[Sent], list[Future[str]]]:
        queues: dict[Receiver, Queue[Parcel]] = {receiver: Queue() for receiver in present}

        def send() -> Sent:
            sending = self.sender.send(WEIGHTS.items(), to, weights_step=1)
            while True:
                try:
                    parcel = next(sending)
                except StopIteration as end:
                    return end.value
                for queue in queues.values():
                    queue.put(parcel)

        def receive(receiver: Receiver) -> str:
            intake, found = self.intakes[receiver], dict[str, Tensor]()
            while True:
                parcel = queues[receiver].get(timeout=30)
                found.update(intake.take(parcel))
                if parcel.last:
                    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())
                    return intake.sha256()

        return self.threads.submit(send), [self.threads.submit(receive, receiver) for receiver in present]


def check(sending: Future[Sent], receiving: list[Future[str]]) -> None:
    assert {future.result() for future in receiving} == {sending.result().sha256}


def test_all_receivers_get_the_same_bytes_hand_over_after_hand_over() -> None:
    a, b = Receiver("a"), Receiver("b")
    site = Site(a, b)
    for _ in range(3):
        check(*site.hand_over(["a", "b"], [a, b]))


def test_another_group_meets_where_the_receivers_are_others() -> None:
    a, b, c = (Receiver(name) for name in "abc")
    site = Site(a, b, c)
    for present in ([a, b], [c], [a, c], []):
        check_all = site.hand_over([receiver.name for receiver in present], present)
        if present:
            check(*check_all)
        else:
            assert check_all[0].result().weights_step == 1


def test_an_engine_of_several_processes_is_as_many_receivers() -> None:
    workers = [Receiver(name, worker) for name in ("a", "b") for worker in range(2)]
    check(*Site(*workers, workers=2).hand_over(["a", "b"], workers))


def test_one_that_does_not_come_breaks_the_transfer_at_the_deadline_and_the_next_is_without_it() -> None:
    a, b = Receiver("a"), Receiver("b")
    site = Site(a, b, deadline_s=2)
    sending, receiving = site.hand_over(["a", "b"], [a])
    for future in (sending, *receiving):
        with pytest.raises(TransferBroken, match="weights did not get through by gloo"):
            future.result()
    check(*site.hand_over(["a"], [a]))


def test_each_process_has_a_place_of_its_own() -> None:
    meeting = Meeting("host", 1, ("a", "b"), workers=2, deadline_s=1)
    places = [meeting.place(Receiver(name, worker)) for name in ("a", "b") for worker in range(2)]
    assert (places, meeting.size) == ([1, 2, 3, 4], 5)


def test_a_transport_is_chosen_by_name() -> None:
    assert isinstance(make_transport("gloo"), Gloo)
    assert isinstance(make_transport("nccl"), NCCL)
    names = ("object_store", "gloo", "nccl", "cuda_ipc")
    assert [make_transport(name).name for name in names] == list(names)
