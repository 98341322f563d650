"""The run of PPO steps: resume, log, checkpoint, stop. What the page leaves out."""

import statistics
import time
from collections.abc import Callable

from rlhf_ray.config import Config
from rlhf_ray.errors import Interrupted
from rlhf_ray.models.checkpoint import newest_valid
from rlhf_ray.training.metrics import MetricsLog, progress_line
from rlhf_ray.training.ppo import PPO, Step
from rlhf_ray.training.run_folder import RunFolder
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
    with MetricsLog(folder.path) as log:
        log.truncate_after(start)
        seconds: list[float] = []
        for step in range(start, config.ppo.steps):
            began = time.monotonic()
            result = ppo.step(step)
            done = step + 1
            metrics = {**result.metrics, **measure(done, result)}
            asked = stopping.asked
            if done % config.checkpoint.every == 0 or done == config.ppo.steps or asked:
                save(ppo, done, folder=folder, say=say)
            seconds = [*seconds[-9:], time.monotonic() - began]
            log.write(done, metrics)
            eta = (config.ppo.steps - done) * statistics.median(seconds)
            say(progress_line(done, config.ppo.steps, metrics, eta, kl_limit=config.ppo.kl.limit))
            if asked and done < config.ppo.steps:
                raise Interrupted(f"stopped on {asked.name}; saved step {done}; the same command resumes", 128 + asked)


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


def save(ppo: PPO, step: int, *, folder: RunFolder, say: Say) -> None:
    """A checkpoint; a full disk costs the checkpoint and is said, the training goes on."""
    refused = ppo.roles.learner.save(folder.checkpoints, step)
    if refused:
        say(f"WARNING: no checkpoint at step {step}: {refused}; training goes on, make room or set run.root")
