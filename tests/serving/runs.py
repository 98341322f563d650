"""A run folder with both models, small enough to make anew in each test."""

from pathlib import Path

from rlhf_ray.config import load_config
from rlhf_ray.models.reward import new_reward_model
from rlhf_ray.training.run_folder import RunFolder
from tests.models.tiny import make_policy_folder

SERVABLE = {"context": 256, "hidden": 64}
"""A size that vLLM on CPU takes: its heads are 32 wide."""


def make_run(root: Path, name: str = "tiny", **size: int) -> Path:
    folder = RunFolder.open(load_config(None, [f"run.root={root}", f"run.id={name}"]))
    folder.close()
    make_policy_folder(folder.policy, **size)
    new_reward_model(folder.policy, "decoder").save(folder.reward_model)
    return folder.path
