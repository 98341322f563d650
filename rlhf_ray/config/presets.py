"""What comes with the choice of an algorithm: the settings of its paper, where they differ from our defaults.

`ppo.advantage=grpo` alone is then GRPO. Whatever a config says itself wins; of what comes with the advantage and with
the loss, the loss's wins. docs/algorithms.md has each algorithm's equation and source.
"""

import copy
from collections.abc import Mapping
from typing import Any

SEVERAL = {"rollout.prompts": 32, "rollout.samples": 4}
"""As many rollouts a step as by default, in groups that can be compared."""

GROUPED = frozenset({"reinforce_pp_baseline", "rloo", "grpo", "dr_grpo"})
"""Advantages whose baseline is what the other responses to the same prompt earned."""

BY_ADVANTAGE: Mapping[str, Mapping[str, Any]] = {
    "gae": {},
    "reinforce": {"ppo.loss": "reinforce", "ppo.epochs": 1},
    "reinforce_pp": {},
    "reinforce_pp_baseline": {
        **SEVERAL,
        "ppo.reward_norm": "none",
        "ppo.kl.where": "loss",
        "ppo.kl.estimator": "k2",
    },
    "rloo": {**SEVERAL, "ppo.whiten": "none"},
    "grpo": {
        **SEVERAL,
        "ppo.reward_norm": "none",
        "ppo.whiten": "none",
        "ppo.average": "sequence",
        "ppo.kl.where": "loss",
        "ppo.kl.estimator": "k3",
    },
    "dr_grpo": {
        **SEVERAL,
        "ppo.reward_norm": "none",
        "ppo.whiten": "none",
        "ppo.average": "constant",
        "ppo.kl.where": "loss",
        "ppo.kl.estimator": "k3",
    },
    # at the usual rate its mostly negative advantages drove the policy away: measured in docs/log.md
    "remax": {"ppo.whiten": "none", "ppo.loss": "reinforce", "ppo.epochs": 1, "ppo.learning_rate": 1e-4},
}
BY_LOSS: Mapping[str, Mapping[str, Any]] = {
    "clip": {},
    "dual_clip": {},
    "gspo": {"ppo.average": "sequence", "ppo.clip": 3e-4, "ppo.clip_high": 4e-4},
    "cispo": {"ppo.clip_high": 5.0},
    "reinforce": {},
}


BY_METHOD: Mapping[str, Mapping[str, Any]] = {
    "rl": {},
    "dpo": {},
    "ipo": {"direct.beta": 0.1},
    # pushing bad answers down is a way without an end, which takes the good ones along: measured in docs/log.md
    "kto": {"direct.beta": 1.0, "direct.learning_rate": 1e-4, "direct.weight_bad": 0.5},
}

STALE = {"ppo.correction": "token"}
"""What rollouts of an older policy come with: truncated importance sampling (Yao et al. 2025)."""

_ALL = (STALE, *BY_ADVANTAGE.values(), *BY_LOSS.values(), *BY_METHOD.values())
GOVERNED = sorted({path for presets in _ALL for path in presets})
"""Keys that come with some algorithm."""


def with_presets(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config's tree with what comes with its algorithms, wherever it does not say otherwise itself."""
    filled = copy.deepcopy(dict(tree))
    comes = BY_ADVANTAGE.get(str(_said(filled, "ppo", "advantage")), {})
    loss = _said(filled, "ppo", "loss") or comes.get("ppo.loss", "clip")
    method = BY_METHOD.get(str(_said(filled, "method")), {})
    behind = STALE if _said(filled, "rollout", "max_staleness") else {}
    for path, value in {**behind, **comes, **BY_LOSS.get(str(loss), {}), **method}.items():
        *sections, key = path.split(".")
        section: Any = filled
        for name in sections:
            section = section.setdefault(name, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):  # what is no section is refused elsewhere, by name
            section.setdefault(key, value)
    return filled


def _said(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree
