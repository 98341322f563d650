"""Parcels hold every tensor once, and the hash tells every change of them."""

import pytest
import torch
from torch import Tensor

from rlhf_ray.transport.intake import Intake
from rlhf_ray.transport.object_store import ObjectStore
from rlhf_ray.transport.parcels import Digest, Parcel, Receiver, Sent, bundles, fingerprint
from rlhf_ray.transport.sending import Sender

SOME = {
    "a": torch.randn(3, 5),
    "half": torch.randn(7).bfloat16(),
    "scalar": torch.tensor(2.5),
    "none": torch.empty(0, 4),
    "turned": torch.randn(4, 6).T,
}


def send(tensors: dict[str, Tensor], step: int = 1, *, parcel_bytes: int = 2**20) -> tuple[list[Parcel], Sent]:
    parcels, sending = [], Sender(ObjectStore(), parcel_bytes=parcel_bytes).send(tensors.items(), [], weights_step=step)
    while True:
        try:
            parcels.append(next(sending))
        except StopIteration as end:
            return parcels, end.value


def receive(parcels: list[Parcel]) -> tuple[dict[str, Tensor], str]:
    intake = Intake(Receiver("generator"))
    found = {name: tensor for parcel in parcels for name, tensor in intake.take(parcel)}
    return found, intake.sha256()


@pytest.mark.parametrize(("parcel_bytes", "count"), [(1, 5), (64, 3), (2**20, 1)])
def test_what_arrives_is_what_was_sent_however_it_is_cut(parcel_bytes: int, count: int) -> None:
    parcels, sent = send(SOME, parcel_bytes=parcel_bytes)
    found, sha256 = receive(parcels)
    assert len(parcels) == count
    assert [parcel.last for parcel in parcels] == [False] * (count - 1) + [True]
    assert list(found) == list(SOME)
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in SOME.items())
    assert sent == (1, sha256, 3 * 5 * 4 + 7 * 2 + 4 + 4 * 6 * 4)


def test_a_bundle_is_made_when_it_is_asked_for_and_no_earlier() -> None:
    made = []
    weights = ((made.append(name) or name, torch.zeros(4)) for name in "abcdef")
    first, last = next(bundles(weights, parcel_bytes=32))
    assert ([name for name, _ in first], last, made) == (["a", "b"], False, ["a", "b"])


def test_tied_tensors_are_sent_under_both_names() -> None:
    shared = torch.randn(4, 2)
    found, _ = receive(send({"embed.weight": shared, "lm_head.weight": shared})[0])
    assert torch.equal(found["lm_head.weight"], shared)


def test_the_hash_depends_on_names_shapes_types_and_order_and_not_on_the_step_or_the_cut() -> None:
    a, b = torch.ones(2), torch.zeros(2)
    different = [
        {"x": a, "y": b},
        {"x": b, "y": a},
        {"y": b, "x": a},
        {"x": a},
        {"x": a.view(2, 1), "y": b},
        {"x": a.int(), "y": b},
    ]
    assert len({send(tensors)[1].sha256 for tensors in different}) == len(different)
    assert send({"x": a, "y": b}, 7, parcel_bytes=1)[1].sha256 == send({"x": a.clone(), "y": b})[1].sha256


def test_a_parcel_that_is_missing_or_comes_twice_is_no_hand_over() -> None:
    parcels, _ = send(SOME, parcel_bytes=64)
    for wrong in (parcels[1:], [parcels[0], parcels[2]], [parcels[0], *parcels[1:2] * 2]):
        with pytest.raises(AssertionError, match=r"parcel . came where"):
            receive(wrong)


def test_a_hand_over_that_broke_off_leaves_nothing_in_the_next_one() -> None:
    parcels, sent = send(SOME, parcel_bytes=64)
    assert receive([*parcels[:2], *parcels])[1] == sent.sha256


def test_views_into_the_store_are_not_copies() -> None:
    parcel = send({"x": torch.arange(4.0)})[0][0]
    ((_, view),) = Intake(Receiver("generator")).take(parcel)
    parcel.contents[0][:4] = 255
    assert torch.isnan(view[0])


# The GPU's fingerprint, computed here on the CPU.


def test_the_fingerprint_is_that_of_the_textbook_loop() -> None:
    flat = torch.randint(0, 256, (21,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded, total = bytes(flat.tolist()) + bytes(3), 0
    for place in range(3):
        x = int.from_bytes(padded[8 * place : 8 * place + 8], "little") + 0x9E3779B97F4A7C15 * (place + 1)
        x %= 2**64
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        total += x ^ (x >> 31)
    assert fingerprint(flat) == (total % 2**64).to_bytes(8, "little")


def test_the_fingerprint_shows_what_a_sum_would_not() -> None:
    flat = torch.randn(64, generator=torch.Generator().manual_seed(0)).view(torch.uint8)
    seen = {fingerprint(flat)}
    negated = flat.clone().view(torch.float32).neg().view(torch.uint8)
    swapped = torch.cat([flat[8:16], flat[:8], flat[16:]])
    for changed in (negated, swapped, flat[:-1], torch.zeros_like(flat)):
        seen.add(fingerprint(changed))
    for bit in range(8 * 16):
        flipped = flat.clone()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(fingerprint(flipped))
    assert len(seen) == 5 + 8 * 16


def test_nothing_has_a_hash_too() -> None:
    assert Digest().result() == Digest().result()
    assert len(fingerprint(torch.empty(0, dtype=torch.uint8))) == 8
