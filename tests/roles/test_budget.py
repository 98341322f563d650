"""A pass that does not fit is made again with less at once."""

import pytest
import torch

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.roles.budget import TokenBudget


def fits(tokens: int, message: str = "CUDA out of memory. Tried to allocate") -> "Pass":
    return Pass(tokens, torch.OutOfMemoryError(message))


class Pass:
    """Raises where it is given more than it has room for."""

    def __init__(self, room: int, error: Exception) -> None:
        self.room, self.error = room, error
        self.tried: list[int] = []

    def __call__(self, tokens: int) -> str:
        self.tried.append(tokens)
        if tokens > self.room:
            raise self.error
        return "done"


def test_it_is_halved_until_it_fits_and_stays_so() -> None:
    budget, one = TokenBudget(1000), fits(300)
    assert budget.spend(one, all_of_it=5000) == "done"
    assert one.tried == [1000, 500, 250]
    assert (budget.tokens, budget.halved) == (250, 2)
    assert budget.spend(one, all_of_it=5000) == "done"
    assert one.tried[3:] == [250]


def test_where_there_is_less_than_the_budget_half_of_that_is_tried_next() -> None:
    one = fits(300)
    assert TokenBudget(8192).spend(one, all_of_it=1000) == "done"
    assert one.tried == [8192, 500, 250]


def test_after_three_times_it_stops_with_the_setting_to_change() -> None:
    budget = TokenBudget(1000)
    with pytest.raises(InfrastructureError, match=r"4 times, last with 125 tokens .*set resources\.learner_tokens"):
        budget.spend(fits(10), all_of_it=5000)


def test_the_machines_own_memory_counts_too_and_nothing_else_does() -> None:
    refused = RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    assert TokenBudget(100).spend(Pass(50, refused), all_of_it=5000) == "done"
    with pytest.raises(RuntimeError, match="size mismatch"):
        TokenBudget(100).spend(Pass(50, RuntimeError("size mismatch")), all_of_it=5000)
