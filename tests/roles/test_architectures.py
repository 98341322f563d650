"""Any Hugging Face causal model learns, and any with one label scores: five families, tiny and random."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GemmaConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen3Config,
)

from rlhf_ray.config import load_config
from rlhf_ray.models.folder import save_folder
from rlhf_ray.models.policy import load_policy, save_policy
from rlhf_ray.models.reward import load_reward_model
from rlhf_ray.roles.learner import Learner
from rlhf_ray.types import Rollout, Sampling, Scored
from tests.models.tiny import make_exchange, make_tokenizer

SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {"num_key_value_heads": 1}),
    "qwen3": (Qwen3Config, {"num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True}),
    "gemma": (GemmaConfig, {"num_key_value_heads": 1, "head_dim": 16}),
    "gpt_neox": (GPTNeoXConfig, {}),
    "mixtral": (MixtralConfig, {"num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}),
}
families = pytest.mark.parametrize("family", FAMILIES)


def make_config(family: str, vocabulary: int, **more: Any) -> PretrainedConfig:
    kind, own = FAMILIES[family]
    return kind(vocab_size=vocabulary, **{**SIZE, **own, **more})


def make_policy(family: str, folder: Path) -> Path:
    tokenizer = make_tokenizer(context=64)
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = AutoModelForCausalLM.from_config(make_config(family, len(tokenizer), bos_token_id=None, **special))
    save_policy(folder, model, tokenizer)
    return folder


@families
def test_every_family_learns_with_a_critic_and_without(family: str, tmp_path: Path) -> None:
    base = make_policy(family, tmp_path / "policy")
    for algorithm in (["ppo.advantage=gae"], ["ppo.advantage=rloo"]):
        settings = ["rollout.prompts=4", "rollout.samples=2", "rollout.max_tokens=8", "ppo.minibatch=4", "run.id=t"]
        learner = Learner.from_folder(base, load_config(None, [*settings, *algorithm, "ppo.learning_rate=3e-3"]))
        pairs = [((10, 11 + i // 2, 12), (20 + i, 30 + i, 40)[: 2 + i % 2]) for i in range(8)]
        rollouts = [
            Rollout(f"r{i}", f"p{i // 2}", prompt, response, tuple(logprobs), 0, "stop")
            for i, ((prompt, response), logprobs) in enumerate(
                zip(pairs, learner.logprobs_of(pairs, Sampling()), strict=True)
            )
        ]
        batch = learner.prepare(Scored(rollouts, [0.0, 1.0] * 4))
        assert batch.metrics["mismatch/max_abs"] < 1e-4
        assert batch.metrics["objective/kl"] == pytest.approx(0.0, abs=1e-4)
        for _ in range(3):
            metrics = learner.update(learner.prepare(Scored(rollouts, [0.0, 1.0] * 4)))
        assert metrics["learn/skipped_updates"] == 0
        after = [sum(row) for row in learner.logprobs_of(pairs, Sampling())]
        gains = [late - sum(rollout.logprobs) for late, rollout in zip(after, rollouts, strict=True)]
        assert sum(gains[1::2]) > sum(gains[::2])


@families
def test_every_familys_policy_is_saved_as_what_it_was_loaded_from(family: str, tmp_path: Path) -> None:
    base = make_policy(family, tmp_path / "policy")
    learner = Learner.from_folder(base, load_config(None, ["run.id=t"]))
    learner.save_policy(tmp_path / "saved")
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(load_policy(tmp_path / "saved")(ids).logits, load_policy(base)(ids).logits)


@families
def test_every_familys_reward_model_scores_a_text_the_same_alone_and_among_others(family: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(context=64)
    torch.manual_seed(1)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = make_config(family, len(tokenizer), num_labels=1, bos_token_id=None, **special)
    save_folder(tmp_path / "rm", AutoModelForSequenceClassification.from_config(config), tokenizer)
    reward_model = load_reward_model(tmp_path / "rm")
    exchanges = [make_exchange(response=text) for text in ("sorry", "we send a new one today", "")]
    together = reward_model.score(exchanges)
    alone = [reward_model.score([exchange])[0] for exchange in exchanges]
    assert together == pytest.approx(alone, abs=1e-5)
    assert len(set(together)) == 3
