"""One typed tree for everything a run can be told; the defaults are the laptop demo.

`load_config` reads YAML, applies dotted overrides and refuses unknown keys by naming the nearest known one.
Imports nothing heavy, so that `rlhf config` and `rlhf --help` answer at once.
"""

from rlhf_ray.config.fits import DirectConfig, FitConfig
from rlhf_ray.config.lora import LoRAConfig
from rlhf_ray.config.ppo import Advantage, PolicyLoss, PPOConfig, RolloutConfig
from rlhf_ray.config.reward_model import RewardModelConfig
from rlhf_ray.config.section import Count, Positive, Section, apply_overrides, known_keys, parse_section
from rlhf_ray.config.tree import (
    AnnotatorConfig,
    Config,
    DataConfig,
    ModelConfig,
    ResourcesConfig,
    dump_config,
    load_config,
)

__all__ = [
    "Advantage",
    "AnnotatorConfig",
    "Config",
    "Count",
    "DataConfig",
    "DirectConfig",
    "FitConfig",
    "LoRAConfig",
    "ModelConfig",
    "PPOConfig",
    "PolicyLoss",
    "Positive",
    "ResourcesConfig",
    "RewardModelConfig",
    "RolloutConfig",
    "Section",
    "apply_overrides",
    "dump_config",
    "known_keys",
    "load_config",
    "parse_section",
]
