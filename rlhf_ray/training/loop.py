"""The run of PPO steps: resume, log, checkpoint, stop. What the page leaves out."""

import statistics
import time
from collections.abc import Callable
from contextlib import closing

from rlhf_ray.config import Config
from rlhf_ray.errors import Interrupted
from rlhf_ray.models.checkpoint import newest_valid
from rlhf_ray.roles.groups import LearnerGroup
from rlhf_ray.training.metrics import MetricsLog, progress_line
from rlhf_ray.training.ppo import PPO, Step
from rlhf_ray.training.run_folder import BEST, RunFolder
from rlhf_ray.training.stopping import Stopping

Measure = Callable[[int, Step], dict[str, float]]
"""Figures for the log that no role may see, such as the gold score, of a number of steps done and the last of them."""
Say = Callable[[str], None]


def train(
    ppo: PPO, *, start: int, folder: RunFolder, config: Config, measure: Measure, stopping: Stopping, say: Say
) -> None:
    """The steps from `start` (what `resume` said) to `ppo.steps`.

    Asked to stop, it finishes the step, saves and raises `Interrupted`; the same command goes on from there.
    """
    with MetricsLog(folder.path) as log, closing(ppo):
        log.truncate_after(start)
        saves = Saves(ppo.roles.learner, folder, say)
        seconds: list[float] = []
        for step in range(start, config.ppo.steps):
            began = time.monotonic()
            if (wanted := folder.wanted_generators) is not None:
                ppo.roles.generators.scale(wanted)
            result = ppo.step(step)
            done = step + 1
            metrics = {**result.metrics, **measure(done, result), **saves.metrics()}
            log.write(done, metrics)  # before its checkpoint: a crash between the two must not lose the line for good
            asked = stopping.asked
            if done % config.checkpoint.every == 0 or done == config.ppo.steps or asked:
                saves.begin(done)
            seconds = [*seconds[-9:], time.monotonic() - began]
            eta = (config.ppo.steps - done) * statistics.median(seconds)
            say(progress_line(done, config.ppo.steps, metrics, eta, kl_limit=config.ppo.kl.limit))
            if asked and done < config.ppo.steps:
                saved = f"saved step {done}" if saves.finish() else f"step {done} could not be saved"
                raise Interrupted(f"stopped on {asked.name}; {saved}; the same command resumes", 128 + asked)
        saves.finish()


class Saves:
    """The loop's checkpoints. A full disk costs a checkpoint and is said and counted; the training goes on."""

    def __init__(self, learner: LearnerGroup, folder: RunFolder, say: Say) -> None:
        self.learner, self.folder, self.say = learner, folder, say
        self.step, self.failed, self.stalled = 0, 0, 0.0

    def begin(self, step: int) -> None:
        """Returns once everything is copied; it is written while the next step goes on."""
        began = time.monotonic()
        best = self.folder.read_json(BEST) or {}
        self._hear(self.learner.save(self.folder.checkpoints, step, best=best.get("step")))
        self.step, self.stalled = step, time.monotonic() - began

    def finish(self) -> bool:
        """Whether the last one is on the disk."""
        return self._hear(self.learner.finish_saving())

    def metrics(self) -> dict[str, float]:
        """How many failed so far, and how long the last step waited for its copy."""
        stalled, self.stalled = self.stalled, 0.0
        return {"checkpoint/failed": float(self.failed), "time/checkpoint_s": stalled}

    def _hear(self, refused: str | None) -> bool:
        if refused:
            self.failed += 1
            self.say(
                f"WARNING: no checkpoint at step {self.step}: {refused}; training goes on, make room or set run.root"
            )
        return refused is None


def resume(ppo: PPO, *, folder: RunFolder, say: Say) -> int:
    """The step to go on from: the learner and every generator hold its weights, verified."""
    checkpoint = newest_valid(folder.checkpoints)
    if checkpoint is None:
        ppo.roles.handoff.publish(0)
        return 0
    for reason in checkpoint.passed_over:
        say(f"passed over a checkpoint that does not verify: {reason}")
    ppo.roles.learner.load(checkpoint)
    ppo.roles.handoff.publish(checkpoint.step)
    say(f"resuming run {folder.path.name} at step {checkpoint.step} from {checkpoint.path}")
    return checkpoint.step
