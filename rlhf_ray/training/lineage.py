"""Where a run's models come from: what the registry keeps beside each version of them."""

import hashlib
from pathlib import Path
from typing import Any

from rlhf_ray.training.run_folder import BEST, existing_run

EVALUATION = ("gold", "win_rate", "reward", "kl", "reward_model")
"""What of a run's summary says how good its policy is."""


def lineage_of(run: Path, *, reward_model_version: int | None = None) -> dict[str, Any]:
    """Run, step, config, feedback snapshot, reward model and evaluation; what a run does not have is None.

    Where held-out prompts were looked at, `step` is the best look's, whose policy the run's is, and `chosen` says by
    whom and among how many steps.

    Example: `{"run_id": "demo", "step": 30, "config_sha256": "9f...", "snapshot": {"id": "s-1f...", ...}, ...}`
    """
    folder, config = existing_run(run)
    summary = folder.read_json("summary.json") or {}
    best = folder.read_json(BEST)
    return {
        "run_id": config.run.id,
        "recipe": config.recipe,
        "step": summary.get("steps") if best is None else best["step"],
        "chosen": None if best is None else {"by": best["by"], "of_steps": summary.get("steps")},
        "config_sha256": hashlib.sha256((run / "config.yaml").read_bytes()).hexdigest(),
        "snapshot": folder.read_json("feedback.json"),
        "reward_model_version": reward_model_version,
        "gate": (folder.read_json("reward_model.json") or {}).get("gate"),
        "evaluation": {name: summary.get(name) for name in EVALUATION} if summary else None,
    }
