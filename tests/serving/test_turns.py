"""One replica swaps at a time; a failure brings everybody back; a dead one blocks nobody."""

from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.serving.turns import Turns

LEASE_S, ALIVE_S = 60.0, 10.0


class HandClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_turns(*replicas: str, wanted: int = 1) -> tuple[Turns, HandClock]:
    """Replicas that all hold the wanted version."""
    clock = HandClock()
    turns = Turns(wanted, lease_s=LEASE_S, alive_s=ALIVE_S, clock=clock)
    for _ in range(2):
        for replica in replicas:
            assert turns.ask(replica, wanted) is None
        clock.now += ALIVE_S / 2
    for replica in replicas:
        turns.ask(replica, wanted)
    return turns, clock


def test_nobody_swaps_while_all_hold_what_is_wanted() -> None:
    turns, _ = make_turns("a", "b")
    assert turns.settled == 1
    assert turns.lease is None


def test_the_first_that_asks_gets_the_turn_and_the_others_wait() -> None:
    turns, _ = make_turns("a", "b")
    turns.want(2)
    assert turns.ask("b", 1) == 2
    assert turns.ask("a", 1) is None
    turns.report("b", 2, tried=2, error=None)
    assert turns.ask("a", 1) == 2


def test_a_swap_is_settled_only_once_all_have_swapped() -> None:
    turns, _ = make_turns("a", "b")
    turns.want(2)
    turns.ask("a", 1)
    turns.report("a", 2, tried=2, error=None)
    assert turns.settled == 1
    turns.ask("b", 1)
    turns.report("b", 2, tried=2, error=None)
    assert turns.settled == 2


def test_a_failure_brings_those_back_that_had_swapped_and_spares_the_rest() -> None:
    turns, _ = make_turns("a", "b", "c")
    turns.want(2)
    turns.ask("a", 1)
    turns.report("a", 2, tried=2, error=None)
    turns.ask("b", 1)
    failure = turns.report("b", 1, tried=2, error="canary")
    assert failure
    assert (failure.number, failure.reason) == (2, "b: canary")
    turns.fall_back(1)
    assert turns.ask("b", 1) is None
    assert turns.ask("c", 1) is None
    assert turns.ask("a", 2) == 1
    turns.report("a", 1, tried=1, error=None)
    assert set(turns.live().values()) == {1}


def test_a_replica_that_dies_in_its_turn_loses_it_and_the_version_has_failed() -> None:
    turns, clock = make_turns("a", "b")
    turns.want(2)
    turns.ask("a", 1)
    clock.now += LEASE_S - 1
    assert turns.expired() is None
    assert turns.ask("b", 1) is None
    clock.now += 1
    failure = turns.expired()
    assert failure
    assert failure.number == 2
    assert "a: not heard of for 60 s" in failure.reason
    assert turns.live() == {"b": 1}


def test_trouble_with_a_version_that_all_held_is_the_replicas_own() -> None:
    turns, _ = make_turns("a", "b")
    turns.want(2)
    turns.ask("a", 1)
    turns.report("a", 2, tried=2, error=None)
    turns.ask("b", 1)
    turns.report("b", 1, tried=2, error="canary")
    turns.fall_back(1)
    turns.ask("a", 2)
    assert turns.report("a", 2, tried=1, error="disk") is None
    assert turns.ask("late", 7) == 1
    assert turns.report("late", 7, tried=1, error="disk") is None


def test_a_report_that_was_lost_is_made_good_by_the_next_question() -> None:
    turns, _ = make_turns("a", "b")
    turns.want(2)
    turns.ask("a", 1)
    assert turns.ask("a", 2) is None
    assert turns.ask("b", 1) == 2


def test_an_answer_that_was_lost_is_given_again_and_the_turn_still_ends_when_it_did() -> None:
    turns, clock = make_turns("a", "b")
    turns.want(2)
    turns.ask("a", 1)
    clock.now += LEASE_S / 2
    assert turns.ask("a", 1) == 2
    clock.now += LEASE_S / 2
    assert turns.expired()


def test_soon_after_a_restart_it_settles_nothing_for_there_may_be_replicas_unheard() -> None:
    clock = HandClock()
    turns = Turns(2, lease_s=LEASE_S, alive_s=ALIVE_S, clock=clock)
    turns.ask("a", 2)
    assert turns.settled is None
    assert turns.ask("b", 1) == 2
    assert turns.report("b", 1, tried=2, error="canary")


def test_a_third_version_wanted_meanwhile_is_next_and_is_not_blamed_for_the_second() -> None:
    turns, _ = make_turns("a", "b")
    turns.want(2)
    turns.ask("a", 1)
    turns.want(3)
    assert turns.report("a", 1, tried=2, error="canary") is None
    assert turns.ask("a", 1) == 3


def test_a_replica_that_is_silent_no_longer_counts() -> None:
    turns, clock = make_turns("a", "gone")
    turns.want(2)
    turns.ask("a", 1)
    clock.now += ALIVE_S + 1
    turns.report("a", 2, tried=2, error=None)
    assert turns.live() == {"a": 2}
    assert turns.settled == 2


def test_one_that_is_silent_because_it_has_the_turn_still_counts() -> None:
    turns, clock = make_turns("a", "b")
    turns.want(2)
    turns.ask("a", 1)
    turns.report("a", 2, tried=2, error=None)
    turns.ask("b", 1)
    clock.now += ALIVE_S + 1
    turns.ask("a", 2)
    assert turns.live() == {"a": 2, "b": 1}
    assert turns.settled == 1


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["ask", "done", "fail", "want", "wait"])), max_size=60)
)
def test_whatever_happens_at_most_one_replica_has_the_turn(events: list[tuple[str, str]]) -> None:
    turns, clock = make_turns("a", "b", "c")
    holds, swapping, newest = dict.fromkeys("abc", 1), {}, 1
    for replica, event in events:
        if event == "ask" and replica not in swapping:
            number = turns.ask(replica, holds[replica])
            if number is not None:
                swapping = {name: n for name, n in swapping.items() if turns.lease and turns.lease.replica == name}
                assert not swapping, "two at a time"
                swapping[replica] = number
        elif event in ("done", "fail") and replica in swapping:
            tried = swapping.pop(replica)
            holds[replica] = tried if event == "done" else holds[replica]
            if turns.report(replica, holds[replica], tried=tried, error=None if event == "done" else "x"):
                turns.fall_back(1)
        elif event == "want":
            newest += 1
            turns.want(newest)
        elif event == "wait":
            clock.now += 7
            if turns.expired():
                turns.fall_back(1)
