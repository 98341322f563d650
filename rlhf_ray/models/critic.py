"""The critic: a body from a model folder, and a head that values each token."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForTokenClassification, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from rlhf_ray.errors import ConfigError
from rlhf_ray.models.files import read_folder
from rlhf_ray.models.folder import explained, quiet_transformers

HEADS = ("score", "classifier")
"""Names of the layer behind the body, in decoders and in encoders."""


def new_critic(body: Path, policy: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> PreTrainedModel:
    """The body of a model folder with a head that says 0, the mean of normalised rewards.

    `options` as in `from_pretrained`. `ConfigError` where the body reads other tokens than the policy's, as a reward
    model's may.
    """
    config = critic_config(body, policy)
    with explained(body, "critic"), quiet_transformers():
        critic: PreTrainedModel = AutoModelForTokenClassification.from_pretrained(
            str(body), config=config, dtype=dtype, local_files_only=True, use_safetensors=True, **options
        )
    for parameter in critic.get_submodule(_head(critic)).parameters():
        nn.init.zeros_(parameter)
    return critic


def critic_config(body: Path, policy: Path) -> PreTrainedConfig:
    """Of `new_critic`'s model."""
    read_folder(body, "critic")
    if body != policy and _vocabulary(body) != _vocabulary(policy):
        raise ConfigError(
            "ppo.critic_from=reward_model: the reward model has another tokenizer than the policy, so it cannot value "
            "the policy's tokens; leave it at policy"
        )
    with explained(body, "critic"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(body), local_files_only=True, num_labels=1)
    config.classifier_dropout = 0.0
    config.use_cache = False  # nobody lets it go on
    return config


def _vocabulary(folder: Path) -> dict[str, int]:
    with explained(folder, "tokenizer"):
        vocabulary: dict[str, int] = AutoTokenizer.from_pretrained(str(folder), local_files_only=True).get_vocab()
    return vocabulary


def _head(critic: PreTrainedModel) -> str:
    return next(name for name in HEADS if hasattr(critic, name))
