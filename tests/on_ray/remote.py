"""What the tests run in other processes; imports little, for each process imports it anew."""

import os
import time

from rlhf_ray.errors import DataError, Diverged


class Worker:
    def pid(self) -> int:
        return os.getpid()

    def sleep(self, seconds: float) -> str:
        time.sleep(seconds)
        return "slept"

    def lose_the_lamp(self) -> None:
        raise KeyError("lamp")

    def diverge(self) -> None:
        raise Diverged("KL is 30 nats")

    def reject(self) -> None:
        raise DataError("row 7 is empty")


def lose_the_disk() -> None:
    raise OSError("the model's disk is gone")


def environment() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}


def fit(steps: int) -> str:
    for step in range(steps):
        print(f"step {step}")
        time.sleep(0.5)
    return "flat"


def reject() -> None:
    raise DataError("row 7 is empty")


def crash() -> None:
    raise KeyError("lamp")


def sum_over_ranks(base: int) -> tuple[str, int]:
    """What all ranks add up to, each with its own number."""
    import torch
    import torch.distributed as dist

    index, count = dist.get_rank(), dist.get_world_size()
    print(f"rank {index} of {count}")
    total = torch.tensor(base + index)
    dist.all_reduce(total)
    return f"rank {index} of {count}", int(total)


def fail_on_the_second() -> None:
    """The first waits for the second, which never comes."""
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise DataError("rank 1 has no rows")
    dist.barrier()


def was_a_rank() -> bool:
    return "WORLD_SIZE" in os.environ
