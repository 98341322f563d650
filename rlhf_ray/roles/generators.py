"""The driver's end of the generators, which may come and go while a run goes on.

`fleet.py` keeps them, `dispatch.py` their work. What holds throughout:

- A rollout is asked for by its id and its seed, which derive from run, step, prompt and sample. So what goes down with
  a generator is asked for again, from another, as the very same request.
- Each call's answer must be exactly the rollouts that it asked for, of the weights step that is wanted. An answer is
  taken from the call that is waited for; whatever a dropped actor still says reaches no one. So none is lost, none is
  doubled, none is stale.
- A newcomer samples only once the hand-off has brought it to the wanted weights and verified that, by the same rule as
  for all (`GeneratorGroup.refit`): in the middle of a batch on its own, between two with the others.
- With `rollout.min_generators` left out there is a fixed map of requests to generators. A lost one is waited for, and
  its successor gets the same share whole, so the batch is the same batch. With fewer, each request goes to the one with
  the fewest outstanding tokens.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import ray

from rlhf_ray.errors import ActorLost, WeightsMismatch
from rlhf_ray.roles.calls import gather, late_error
from rlhf_ray.roles.dispatch import Dispatch
from rlhf_ray.roles.fleet import Ask, Fleet
from rlhf_ray.roles.generator import Sampled
from rlhf_ray.roles.weights import Push, WeightsSinks
from rlhf_ray.types import GenerationRequest, Rollout, Sampling, WeightsReceipt


class Refit(Protocol):
    """`weights.WeightsHandoff.publish`."""

    def __call__(self, weights_step: int, *, to: WeightsSinks) -> object:
        """Brings some generators to the weights of this step, verified."""


Follow = Callable[[Rollout], GenerationRequest | None]
"""What is asked for once a rollout has ended, under its id: the next turn of a dialogue; None where that was all."""


class GeneratorGroup:
    """All generators as one; `weights.WeightsSinks`. `ask` asks Ray for an actor by name."""

    def __init__(
        self,
        ask: Ask,
        *,
        wanted: int,
        minimum: int | None = None,
        deadline_s: float,
        start_deadline_s: float = 300.0,
        say: Callable[[str], None] = print,
    ) -> None:
        self.fleet = Fleet(ask, wanted=wanted, minimum=minimum, start_deadline_s=start_deadline_s, say=say)
        self.deadline_s = deadline_s
        self.weights_step: int | None = None
        """What was released last; once there is one, rollouts of any other step are refused."""
        self.refit: Refit | None = None
        """How one that comes late is brought to the weights; without it, it waits for the next hand-over to all."""
        self._session: Session | None = None
        self._dispatch: Dispatch | None = None
        """Of the last session, or the one that is open."""

    @property
    def actors(self) -> Mapping[str, Any]:
        """All that were asked for and are not lost, by name."""
        return self.fleet.actors

    @property
    def nodes(self) -> Mapping[str, str]:
        """Where each ready one lives."""
        return self.fleet.nodes

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling, *, follow: Follow = lambda _: None
    ) -> list[Rollout]:
        """A rollout for each request, in their order, whoever is lost or comes; with `follow` the last one of each."""
        if self._session is not None:
            return self._session.generate(requests, sampling, follow)
        with self.session() as session:
            return session.generate(requests, sampling, follow)

    @contextmanager
    def session(self, *, turn_s: float = math.inf, max_staleness: int = 0) -> Iterator["Session"]:
        """Sampling under way: requests may be added as others end, and weights handed over in between.

        A generator samples for `turn_s` at a time; only between two turns it takes new requests or new weights. What
        is under way when they come goes on with them (`Rollout.swaps`); a rollout that would begin more than
        `max_staleness` weights steps behind is refused. What is asked of the group by `generate` meanwhile is sampled
        beside it.
        """
        assert self._session is None, "one session at a time"
        fixed = self.fleet.minimum == self.fleet.wanted
        self._dispatch = Dispatch(slots=self.fleet.wanted, fixed=fixed, max_staleness=max_staleness)
        self._session = Session(self, self._dispatch, turn_s=turn_s)
        try:
            yield self._session
        finally:
            self.fleet.calls.forget(list(self.nodes))
            self._session = None

    def scale(self, wanted: int) -> None:
        """So many generators from here on, between two batches; those that come are brought to the weights first."""
        if wanted != self.fleet.wanted:
            self.fleet.scale(wanted)

    def names(self) -> list[str]:
        """Those that are ready by now."""
        self.fleet.look()
        return list(self.nodes)

    def answering(self) -> list[str]:
        """Those that are ready and answer."""
        return _Some(self, self.nodes).answering()

    def load_weights(self, pushed: Push) -> dict[str, WeightsReceipt]:
        """Every generator that is ready loads what the learner pushes; none may sample until `release`."""
        return _Some(self, self.nodes).load_weights(pushed)

    def probe(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> dict[str, list[Sampled]]:
        """Every generator's responses to every prompt, whether it may sample or not."""
        return _Some(self, self.nodes).probe(prompts, sampling, seeds=seeds)

    def release(self, weights_step: int) -> None:
        """Lets every generator sample with this step's weights."""
        _Some(self, self.nodes).release(weights_step)
        self.weights_step = weights_step
        self.fleet.fit_on_arrival = False

    def retire(self, name: str, error: WeightsMismatch) -> None:
        """Ends a generator that does not hold the weights; another is asked for in its place."""
        self.fleet.remove(name, error)

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """In here the engines hold no memory; they wake without weights, and wait for a hand-over."""
        self.fleet.look()
        everyone = _Some(self, self.nodes)
        everyone.sleep()
        yield
        everyone.wake()

    def census(self) -> dict[str, float]:
        """`rollout/` metrics of what was sampled, and of who came and went, since this was last asked."""
        joined, lost = self.fleet.came_and_went()
        sampled, retried = self._dispatch.told() if self._dispatch else (Counter[str](), 0)
        return {
            "rollout/generators": float(len(self.fleet.fit)),
            "rollout/share_max": max(sampled.values(), default=0) / max(1, sampled.total()),
            "rollout/retried": float(retried),
            "rollout/joined": float(joined),
            "rollout/lost_generators": float(lost),
        }

    def close(self) -> None:
        """Ends the actors and frees what they hold."""
        self.fleet.close()

    def refit_newcomers(self) -> None:
        """Brings those that are ready, but not yet proved to hold the weights, to them."""
        newcomers = self.fleet.unfit
        if newcomers and self.refit is not None and self.weights_step is not None:
            self.refit(self.weights_step, to=_Some(self, newcomers))


class Session:
    """Rollouts under way in a group; see `GeneratorGroup.session`."""

    def __init__(self, group: GeneratorGroup, dispatch: Dispatch, *, turn_s: float) -> None:
        self.group, self.dispatch, self.turn_s = group, dispatch, turn_s
        self._in_turn: set[str] = set()
        self._kept: dict[str, Rollout] = {}
        """Ended while `generate` waited for others."""
        self.refits = True
        """Whether newcomers are brought to the weights between two turns. While the learner learns they cannot be: the
        weights that are wanted are about to be no more. They wait for the next hand-over to all."""
        self._since: dict[str, float] = {}
        """When each generator that has something to do last gave a rollout, or was given its first request."""

    def ask(self, requests: Sequence[GenerationRequest], sampling: Sampling) -> None:
        """Adds requests, to be drawn so; they begin with the next `take`."""
        self.dispatch.ask([replace(request, sampling=sampling) for request in requests])

    def generate(self, requests: Sequence[GenerationRequest], sampling: Sampling, follow: Follow) -> list[Rollout]:
        """A rollout for each of these, in their order; what else ends meanwhile is kept for `take`."""
        self.ask(requests, sampling)
        wanted, done = {request.rollout_id for request in requests}, dict[str, Rollout]()
        while len(done) < len(wanted):
            for rollout in self._turn():
                if rollout.id not in wanted:
                    self._kept[rollout.id] = rollout
                elif (request := follow(rollout)) is not None:
                    self.ask([request], sampling)
                else:
                    done[rollout.id] = rollout
        self.dispatch.forget(wanted)
        return [done[request.rollout_id] for request in requests]

    def take(self) -> list[Rollout]:
        """Rollouts that have ended, as soon as there are any; none once nothing is under way."""
        while not self.done:
            if ended := self.turn():
                return ended
        return []

    @property
    def done(self) -> bool:
        """Whether nothing is under way, or waits to be taken."""
        return self.dispatch.done and not self._kept

    def turn(self) -> list[Rollout]:
        """What one generator's turn came to, nothing perhaps; for who has something else to do between turns."""
        kept, self._kept = list(self._kept.values()), {}
        return kept or self._turn()

    @property
    def stuck(self) -> bool:
        """Whether nobody is there to go on."""
        return not self.group.fleet.fit

    def _turn(self) -> list[Rollout]:
        if self.refits:
            self.group.refit_newcomers()
        self._take_back()
        self._begin_turns()
        return self._end_turn()

    def _take_back(self) -> None:
        """What generators were at that were lost between two turns, under a hand-over."""
        for name in [name for name, given in self.dispatch.given.items() if given and name not in self.group.nodes]:
            self._in_turn.discard(name)
            self.dispatch.lost(name, ActorLost(f"{name} was lost while weights were handed over"))

    def _begin_turns(self) -> None:
        """A turn for each generator that may sample, has something to do and is between two turns."""
        group, fleet = self.group, self.group.fleet
        between = sorted(fleet.fit - self._in_turn, key=fleet.slots.__getitem__)
        for name, requests in self.dispatch.hand_out({name: fleet.slots[name] for name in between}).items():
            ref = fleet.actors[name].generate.remote(requests, weights_step=group.weights_step, for_s=self.turn_s)
            doing = f"generating {len(self.dispatch.given[name])} rollouts"
            fleet.calls.add(name, ref, doing=doing, node=fleet.nodes[name], deadline_s=group.deadline_s)
            self._in_turn.add(name)
            self._since.setdefault(name, time.monotonic())

    def _end_turn(self) -> list[Rollout]:
        """Whatever comes next: a turn's rollouts, or none where a generator was lost or a newcomer came."""
        outcome = self.group.fleet.turn()
        if outcome is None:
            return []
        name = outcome.name
        self._in_turn.discard(name)
        if outcome.error is not None:
            self.dispatch.lost(name, outcome.error)
            return []
        rollouts = self.dispatch.answered(name, outcome.value, weights_step=self.group.weights_step)
        if rollouts:
            del self._since[name]
        else:
            self._check_progress(name)
        return rollouts

    def _check_progress(self, name: str) -> None:
        """Drops a generator that takes its turns and ends nothing."""
        group = self.group
        if time.monotonic() - self._since[name] >= group.deadline_s:
            late = late_error(
                name, group.nodes, deadline_s=group.deadline_s, doing="generating without ending anything"
            )
            group.fleet.remove(name, late)
            self.dispatch.lost(name, late)


class _Some:
    """Some of a group's generators, as the hand-off sees them. One that is lost under it is left out from there on."""

    def __init__(self, group: GeneratorGroup, names: Collection[str]) -> None:
        self.group, self._names = group, list(names)

    def names(self) -> list[str]:
        return [name for name in self._names if name in self.group.nodes]

    def answering(self) -> list[str]:
        return list(self._each(lambda actor: actor.ping.remote(), "answering"))

    def load_weights(self, pushed: Push) -> dict[str, WeightsReceipt]:
        fleet = self.group.fleet
        loading = [{name: fleet.actors[name].load_weights.remote(parcel) for name in self.names()} for parcel in pushed]
        receipts: dict[str, WeightsReceipt] = {}
        for calls in loading:  # the last call's answers are the receipts; what an earlier one raised comes first
            receipts = self._answers(
                {name: ref for name, ref in calls.items() if name in fleet.nodes}, "loading weights"
            )
        return receipts

    def probe(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seeds: Sequence[int]
    ) -> dict[str, list[Sampled]]:
        doing = f"answering {len(prompts)} probes"
        return self._each(lambda actor: actor.probe.remote(prompts, sampling, seeds=seeds), doing)

    def release(self, weights_step: int) -> None:
        doing = f"being released at weights step {weights_step}"
        self.group.fleet.released(self._each(lambda actor: actor.release.remote(weights_step), doing))

    def sleep(self) -> None:
        self._each(lambda actor: actor.sleep.remote(), "going to sleep")

    def wake(self) -> None:
        self._each(lambda actor: actor.wake.remote(), "waking up")

    def retire(self, name: str, error: WeightsMismatch) -> None:
        self.group.retire(name, error)

    def _each(self, call: Callable[[Any], ray.ObjectRef], doing: str) -> dict[str, Any]:
        fleet = self.group.fleet
        return self._answers({name: call(fleet.actors[name]) for name in self.names()}, doing)

    def _answers(self, calls: Mapping[str, ray.ObjectRef], doing: str) -> dict[str, Any]:
        fleet = self.group.fleet
        return gather(
            calls, deadline_s=self.group.deadline_s, doing=doing, nodes=dict(fleet.nodes), on_lost=fleet.remove
        )
