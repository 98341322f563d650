"""Groups share work out and put the answers together in order, whatever Ray does between."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest

from rlhf_ray.errors import InfrastructureError
from rlhf_ray.roles import groups
from rlhf_ray.roles.generator import Generator
from rlhf_ray.roles.groups import GeneratorGroup, ScorerGroup
from rlhf_ray.types import Rollout, Sampling
from tests.roles.fakes import EchoEngine, LengthScorer, make_exchange, make_request


class Handle:
    """An actor handle whose calls are answered on the spot."""

    def __init__(self, role: Any) -> None:
        self.role = role
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, method: str) -> Any:
        handle = self

        class Method:
            def remote(self, *args: Any, **kwargs: Any) -> Any:
                handle.calls.append(args)
                return getattr(handle.role, method)(*args, **kwargs)

        return Method()


def on_the_spot(calls: Mapping[str, Any], _: str) -> dict[str, Any]:
    return dict(calls)


def local_group(kind: Callable[..., Any], *roles: Any) -> Any:
    group = kind({f"role-{i}": Handle(role) for i, role in enumerate(roles)}, deadline_s=1)
    group._gather = on_the_spot
    return group


def two_generators() -> GeneratorGroup:
    return local_group(GeneratorGroup, *(Generator(EchoEngine(), weights_step=0) for _ in range(2)))


def test_rollouts_come_in_the_order_of_their_requests() -> None:
    requests = [make_request(i) for i in range(7)]
    rollouts = two_generators().generate(requests, Sampling())
    assert [rollout.id for rollout in rollouts] == [request.rollout_id for request in requests]


def test_a_batch_is_shared_out_the_same_way_every_time_and_in_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "WAVE", 2)
    group = two_generators()
    group.generate([make_request(i) for i in range(5)], Sampling())
    shares = [[[r.seed for r in call[0]] for call in handle.calls] for handle in group.actors.values()]
    assert shares == [[[0, 2], [4]], [[1, 3]]]


def test_no_requests_give_no_rollouts() -> None:
    assert two_generators().generate([], Sampling()) == []


def test_a_missing_rollout_stops_the_step_and_is_named() -> None:
    group = two_generators()
    other = Rollout("run/9/p9/0", "p9", (1,), (2,), (-1.0,), 0, "stop")
    group._gather = lambda calls, _: {name: [other] for name in calls}  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError, match="asked for 2 rollouts, got 2, 2 missing, first run/0/p0/0"):
        group.generate([make_request(0), make_request(1)], Sampling())


def test_a_rollout_too_many_stops_the_step() -> None:
    group = two_generators()
    group._gather = lambda calls, _: {name: rollouts * 2 for name, rollouts in calls.items()}  # type: ignore[method-assign]
    with pytest.raises(InfrastructureError, match="asked for 1 rollouts, got 2"):
        group.generate([make_request(0)], Sampling())


def test_after_a_release_a_generator_with_another_step_is_refused() -> None:
    group = two_generators()
    group.release(0)
    next(iter(group.actors.values())).role.weights_step = 1
    with pytest.raises(InfrastructureError, match="step 0 is wanted"):
        group.generate([make_request(0)], Sampling())


@pytest.mark.parametrize("scorers", [1, 2, 3, 9])
def test_scores_come_in_the_order_of_the_exchanges(scorers: int) -> None:
    group = local_group(ScorerGroup, *(LengthScorer() for _ in range(scorers)))
    assert group.score([make_exchange("a" * n) for n in (5, 3, 9, 1, 4)]) == [5.0, 3.0, 9.0, 1.0, 4.0]
