"""`rlhf profile`: some steps of a run's loop, made once more and thrown away, to see who worked when and who waited.

The picture is a Chrome trace (open it at ui.perfetto.dev, or chrome://tracing) and a part of the run's report.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_ray.config import Config, load_config
from rlhf_ray.errors import ConfigError, InputError
from rlhf_ray.roles.busy import Busy, busy_of
from rlhf_ray.training.improve import start_roles
from rlhf_ray.training.loop import resume
from rlhf_ray.training.panels import WAIT
from rlhf_ray.training.ppo import PPO
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.training.report import write_report
from rlhf_ray.training.run_folder import PROFILE, TRACE, RunFolder, existing_run, write_whole
from rlhf_ray.training.stages import Run
from rlhf_ray.training.stopping import Stopping

Say = Callable[[str], None]

PHASES = {"generate": "generate", "score": "score", "prepare": "prepare", "update": "learn"}
"""By method. Whatever else an actor is at while steps go on belongs to the hand-over of weights."""
HAND_OVER = "hand over"


class Piece(NamedTuple):
    """Part of a lane."""

    phase: str
    start: float
    """Seconds after the first step began."""
    end: float


@dataclass(frozen=True)
class Profile:
    """Some steps of a loop, by actor."""

    settings: list[str]
    """What was set otherwise than in the run."""
    steps: list[tuple[float, float]]
    """Begin and end of each, in seconds after the first one began."""
    lanes: dict[str, list[Piece]]
    """Each actor's work and waits, without a gap."""

    @property
    def seconds(self) -> float:
        """From the first step's begin to the last one's end."""
        return self.steps[-1][1]

    @property
    def shares(self) -> dict[str, dict[str, float]]:
        """By actor: how much of the time went into each phase; they add up to 1."""
        return {
            name: {
                phase: sum(piece.end - piece.start for piece in lane if piece.phase == phase) / self.seconds
                for phase in dict.fromkeys(piece.phase for piece in lane)
            }
            for name, lane in self.lanes.items()
        }

    @property
    def nobody(self) -> float:
        """Share of the time in which no actor worked: the loop itself, and calls on their way."""
        worked = sorted((piece.start, piece.end) for lane in self.lanes.values() for piece in lane if _works(piece))
        covered, reached = 0.0, 0.0
        for start, end in worked:
            covered += max(0.0, end - max(start, reached))
            reached = max(reached, end)
        return 1 - covered / self.seconds


def profile(path: Path, settings: Sequence[str], *, steps: int, say: Say) -> Profile:
    """Makes some steps from where the run stands, with these settings; the run itself stays as it is.

    Leaves `trace.json` and `profile.json` in the run's folder and writes its report anew.
    """
    folder, config = prepared(path, settings, steps=steps)
    stopping = Stopping()
    with ExitStack() as stack:
        stack.enter_context(stopping.listening())
        run = Run(config, folder, make_recipe(config), stopping, say, stack)
        ppo = stack.enter_context(closing(start_roles(run)))
        step = resume(ppo, folder=folder, say=say)
        for _ in range(config.rollout.max_staleness + 1):  # the first ones fill caches, and the steps ahead
            ppo.step(step)
            step += 1
        _busy(ppo, config)
        taken = []
        for number in range(steps):
            start = time.time()
            ppo.step(step + number)
            taken.append((start, time.time()))
            say(f"step {number + 1} of {steps}: {taken[-1][1] - start:.2f} s")
        found = Profile(list(settings), *_from_begin(taken, _busy(ppo, config)))
    write_whole(path / TRACE, json.dumps(chrome_trace(found)))
    folder.write_json(PROFILE, {**asdict(found), "shares": found.shares, "nobody": found.nobody})
    write_report(path)
    return found


def table(found: Profile) -> list[str]:
    """Shares of the time by actor, as lines of text."""
    phases = [*dict.fromkeys([*PHASES.values(), HAND_OVER]), WAIT]
    phases = [phase for phase in phases if any(phase in shares for shares in found.shares.values())]
    width = max(map(len, found.lanes))
    lines = [f"{len(found.steps)} steps, {found.seconds / len(found.steps):.2f} s each; shares of the time"]
    lines += [" ".join([" " * width, *(f"{phase:>9}" for phase in phases)])]
    lines += [
        " ".join([f"{name:<{width}}", *(f"{shares.get(phase, 0.0):>9.1%}" for phase in phases)])
        for name, shares in found.shares.items()
    ]
    return [*lines, f"nobody worked in {found.nobody:.1%}: the loop itself, and calls on their way"]


def chrome_trace(found: Profile) -> dict[str, Any]:
    """In the format that Chrome's and Perfetto's viewers read, times in microseconds."""
    lanes = {"loop": [Piece("step", *step) for step in found.steps], **found.lanes}
    events: list[dict[str, Any]] = []
    for number, (name, lane) in enumerate(lanes.items()):
        events.append({"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": name}})
        events += [
            {
                "ph": "X",
                "name": piece.phase,
                "cat": piece.phase,
                "pid": 0,
                "tid": number,
                "ts": round(piece.start * 1e6),
                "dur": round((piece.end - piece.start) * 1e6),
            }
            for piece in lane
        ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def lane_of(busy: Sequence[Busy], end: float) -> list[Piece]:
    """An actor's time from 0 to `end`: what it was at, and between that, waits."""
    lane, reached = list[Piece](), 0.0
    for work in sorted(busy, key=lambda work: work.start):
        start, stop = max(work.start, reached), min(work.end, end)
        if stop <= start:
            continue
        if start > reached:
            lane.append(Piece(WAIT, reached, start))
        lane.append(Piece(PHASES.get(work.what, HAND_OVER), start, stop))
        reached = stop
    return [*lane, Piece(WAIT, reached, end)] if reached < end else lane


def prepared(path: Path, settings: Sequence[str], *, steps: int) -> tuple[RunFolder, Config]:
    """The run, and its config as it is tried; raises where there is nothing to try."""
    folder, _ = existing_run(path)
    config = load_config(path / "config.yaml", settings)
    if config.method != "rl":
        raise ConfigError(f"{path} learns by method={config.method}, which has no loop of roles to profile")
    looked_at = steps + 2 * config.rollout.max_staleness + 1  # warming up, watched, and ahead of the last one
    further = config.ppo.steps + looked_at  # beyond the end of a run that is done
    config = load_config(path / "config.yaml", [*settings, f"ppo.steps={further}"])
    missing = [folder.base_policy, *([folder.reward_model] if config.needs_reward_model else [])]
    for needed in missing:
        if not needed.is_dir():
            raise InputError(f"{path} has no {needed.name.replace('_', ' ')} yet: run its command again first")
    return folder, config


def _busy(ppo: PPO, config: Config) -> dict[str, list[Busy]]:
    """What everyone was at since this was last asked."""
    roles = ppo.roles
    generators = {name: roles.generators.actors[name] for name in roles.generators.nodes}
    actors: Mapping[str, Any] = {**generators, **roles.scorers.actors, **roles.learner.actors}
    return busy_of(actors, deadline_s=config.resources.call_deadline_s)


def _from_begin(
    steps: Sequence[tuple[float, float]], busy: Mapping[str, Sequence[Busy]]
) -> tuple[list[tuple[float, float]], dict[str, list[Piece]]]:
    """Steps and lanes, timed from the first step's begin."""
    zero, end = steps[0][0], steps[-1][1] - steps[0][0]
    lanes = {
        name: lane_of([Busy(what, start - zero, stop - zero) for what, start, stop in lane], end)
        for name, lane in busy.items()
    }
    return [(start - zero, stop - zero) for start, stop in steps], lanes


def _works(piece: Piece) -> bool:
    return piece.phase != WAIT
