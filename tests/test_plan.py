"""Preflight: every actor finds a place now or later, or the missing piece is named."""

from pathlib import Path

import pytest

from rlhf_ray.clusters import Cluster, Group, Growth, Node
from rlhf_ray.config import load_config
from rlhf_ray.errors import ConfigError
from rlhf_ray.plan import Ask, Plan, asks_of, plan, plan_run, require_room


def node(group: str = "", **total: float) -> Node:
    return Node(group, total=dict(total), free=dict(total))


def busy(total: dict[str, float], free: dict[str, float]) -> Node:
    return Node("", total=total, free=free)


def may_have(*groups: Group, at_most: int = 100) -> Growth:
    return Growth(groups, at_most=at_most, told="told")


def places(found: Plan) -> dict[str, tuple[int, int, int, int]]:
    return {row.ask.role: (row.now, row.grows, row.waits, row.missing) for row in found.rows}


GENERATORS = Ask("generator", 3, {"CPU": 1.0, "GPU": 1.0})
LEARNER = Ask("learner", 1, {"CPU": 1.0, "GPU": 2.0})
SCORER = Ask("scorer", 1, {"CPU": 1.0, "GPU": 0.0})


def test_what_is_there_and_free_is_taken_first() -> None:
    found = plan([GENERATORS], [node(CPU=8, GPU=2)], may_have(Group("gpu", 5, {"CPU": 8, "GPU": 1})))
    assert places(found) == {"generator": (2, 1, 0, 0)}
    assert not found.lacks


def test_the_largest_is_seated_first_wherever_it_stands_in_the_list() -> None:
    found = plan([GENERATORS, LEARNER], [node(CPU=8, GPU=2), node(CPU=8, GPU=1)], may_have())
    assert places(found) == {"generator": (1, 0, 0, 2), "learner": (1, 0, 0, 0)}


def test_who_needs_no_gpu_leaves_the_gpu_nodes_to_others() -> None:
    found = plan([SCORER, LEARNER], [node(CPU=1, GPU=2), node(CPU=1)], may_have())
    assert places(found) == {"scorer": (1, 0, 0, 0), "learner": (1, 0, 0, 0)}


def test_one_actor_never_spans_two_nodes() -> None:
    (lack,) = plan([LEARNER], [node(CPU=8, GPU=1), node(CPU=8, GPU=1)], may_have()).lacks
    assert "each needs 2 GPU on one node, and the best node that there is or may be has 1 GPU" in lack


def test_halves_of_a_gpu_share_it_and_a_third_half_does_not() -> None:
    found = plan([Ask("scorer", 3, {"CPU": 1.0, "GPU": 0.5})], [node(CPU=8, GPU=1)], may_have())
    assert places(found) == {"scorer": (2, 0, 0, 1)}


def test_tenths_of_a_gpu_fill_it_in_spite_of_rounding() -> None:
    assert not plan([Ask("scorer", 10, {"CPU": 1.0, "GPU": 0.1})], [node(CPU=16, GPU=1)], may_have()).lacks


def test_what_others_use_is_waited_for_and_not_refused() -> None:
    found = plan([LEARNER], [busy({"CPU": 8, "GPU": 2}, {"CPU": 8, "GPU": 0})], may_have())
    assert places(found) == {"learner": (0, 0, 1, 0)}
    assert not found.lacks


def test_new_nodes_are_as_many_as_the_group_and_the_cluster_allow() -> None:
    group = Group("gpu", 2, {"CPU": 8, "GPU": 1})
    assert places(plan([GENERATORS], [], may_have(group))) == {"generator": (0, 2, 0, 1)}
    assert places(plan([GENERATORS], [], may_have(group, at_most=1))) == {"generator": (0, 1, 0, 2)}


def test_one_new_node_holds_several_actors() -> None:
    found = plan([GENERATORS], [], may_have(Group("gpu", 1, {"CPU": 8, "GPU": 4})))
    assert places(found) == {"generator": (0, 3, 0, 0)}


def test_the_smallest_kind_of_node_that_fits_is_asked_to_come() -> None:
    small, large = Group("small", 1, {"CPU": 4, "GPU": 1}), Group("large", 1, {"CPU": 64, "GPU": 8})
    one = Ask("generator", 1, {"CPU": 1.0, "GPU": 1.0})
    assert not plan([one, Ask("learner", 1, {"CPU": 8.0, "GPU": 8.0})], [], may_have(large, small)).lacks


def test_a_missing_gpu_is_named_with_the_key_that_does_without() -> None:
    (lack,) = plan([GENERATORS], [node(CPU=8)], Growth()).lacks
    assert lack.startswith("generator: 3 of 3 would wait for ever: each needs 1 GPU")
    assert "resources.generator_gpus=0" in lack
    assert "resources.cluster=" in lack  # nobody said what it may grow to


def test_an_autoscaler_with_unknown_limits_leaves_it_open(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster((node("head", CPU=1),), Growth(told="untold"))
    monkeypatch.setattr("rlhf_ray.plan.look_at", lambda address, config_file: cluster)
    found = require_room(load_config(None, ["resources.address=auto", "resources.learner_gpus=1"]))
    assert (bool(found.lacks), found.certain) == (True, False)


def test_too_many_are_told_how_many_there_is_room_for() -> None:
    (lack,) = plan([GENERATORS], [node(CPU=8, GPU=2)], may_have()).lacks
    assert "there is room for 2 of 3" in lack
    assert "rollout.generators=2" in lack


def test_those_that_a_run_can_do_without_are_no_reason_to_refuse_it() -> None:
    for needed, lacks in ((2, 0), (3, 1)):
        some = Ask("generator", 5, {"CPU": 1.0, "GPU": 1.0}, needed=needed)
        assert len(plan([some], [node(CPU=8, GPU=2)], may_have()).lacks) == lacks


def test_a_pinned_role_without_its_group_is_told_so() -> None:
    config = load_config(None, ["resources.pin_roles=true"])
    lacks = plan(asks_of(config), [node(CPU=8, rlhf_generator=1, rlhf_scorer=1)], may_have()).lacks
    assert [lack.split(":")[0] for lack in lacks] == ["learner"]
    assert "rlhf_learner" in lacks[0]
    assert "resources.pin_roles=false" in lacks[0]


def test_resources_that_are_on_different_nodes_do_not_add_up() -> None:
    (lack,) = plan([Ask("learner", 1, {"CPU": 4.0, "GPU": 1.0})], [node(CPU=8), node(CPU=1, GPU=1)], may_have()).lacks
    assert "no node has 4 CPU, 1 GPU together" in lack


def test_the_table_says_who_goes_where() -> None:
    found = plan([GENERATORS, LEARNER], [node(CPU=8, GPU=2)], may_have(Group("gpu", 2, {"CPU": 8, "GPU": 1})))
    lines = str(found).splitlines()
    assert [" ".join(line.split()) for line in lines[1:]] == [
        "generator 3 1 CPU, 1 GPU 2 on nodes to come, 1 NOWHERE",
        "learner 1 1 CPU, 2 GPU 1 now",
    ]


def test_a_run_asks_for_its_generators_scorers_and_learner() -> None:
    config = load_config(None, ["rollout.generators=4", "resources.scorers=2", "resources.learner_gpus=1"])
    assert {ask.role: (ask.count, ask.each["GPU"]) for ask in asks_of(config)} == {
        "generator": (4, 0),
        "scorer": (2, 0),
        "learner": (1, 1),
    }


def test_this_machine_has_seats_for_any_number_of_cpu_roles_and_only_its_own_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Cluster((node("this machine", GPU=1),), ours=True)
    monkeypatch.setattr("rlhf_ray.plan.look_at", lambda address, config_file: here)
    assert not plan_run(load_config(None, ["rollout.generators=40", "resources.pin_roles=true"])).lacks
    with pytest.raises(ConfigError, match=r"(?s)cannot give.*learner +1 .*1 NOWHERE.*resources.learner_gpus=0"):
        require_room(load_config(None, ["resources.learner_gpus=2"]))


def test_the_config_names_the_cluster_and_an_address_given_by_hand_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path]] = []
    monkeypatch.setattr("rlhf_ray.plan.look_at", lambda *of: (asked.append(of), Cluster((node(CPU=8),)))[1])
    config = load_config(None, ["resources.address=auto", "resources.cluster=c.yaml"])
    plan_run(config)
    plan_run(config, address="http://head:8265")
    assert asked == [("auto", Path("c.yaml")), ("http://head:8265", Path("c.yaml"))]
