"""One of TRL's trainers on the workload, in TRL's own environment; `peers.py` starts it. A JSON line a step.

python benchmarks/peer_trl.py FOLDER grpo --steps 6 --epochs 1 --threads 2
"""

import argparse
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

ROLLOUTS, PROMPT, RESPONSE, MINIBATCH, SAMPLES = 64, 16, 64, 16, 8
PAD, END, WANTED_ID = 0, 1, 3
KL = 5e-4


class Clock(TrainerCallback):
    """Tells what a step took, and what its log says of the reward."""

    def __init__(self, every: int = 1) -> None:
        self.last, self.every = time.perf_counter(), every

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.every == 0:
            now = time.perf_counter()
            print(json.dumps({"step": state.global_step // self.every, "seconds": now - self.last}), flush=True)
            self.last = now

    def on_log(self, args, state, control, logs=None, **_):
        reward = (logs or {}).get("reward", (logs or {}).get("objective/scores"))
        if reward is not None:
            print(json.dumps({"step": state.global_step // self.every, "reward": float(reward)}), flush=True)


class ShareOfWanted(torch.nn.Module):
    """A reward model, as PPOTrainer calls one, that says the share of a response's tokens that are wanted."""

    base_model_prefix = "body"

    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Identity()
        self.config = SimpleNamespace()

    def body(self, input_ids, **_):
        wanted = (input_ids % 16 == WANTED_ID).float()
        wanted[:, :PROMPT] = 0
        seen = (torch.arange(input_ids.shape[1]) - PROMPT + 1).clamp(min=1)
        return SimpleNamespace(hidden_states=[(wanted.cumsum(1) / seen)[..., None]])


def main() -> None:
    """Trains for some steps."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("trainer", choices=("ppo", "grpo", "rloo"))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=1e-6)
    parser.add_argument("--learn", action="store_true", help="the reward is the share of wanted tokens")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.folder / "policy")
    policy = AutoModelForCausalLM.from_pretrained(options.folder / "policy", dtype=torch.float32)
    ids = json.loads((options.folder / "prompts.json").read_text())
    (ppo if options.trainer == "ppo" else grouped)(options, tokenizer, policy, ids)


def ppo(options, tokenizer, policy, ids) -> None:
    """PPOTrainer."""
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    args = PPOConfig(
        output_dir="/tmp/trl", report_to="none", use_cpu=True, bf16=False, save_strategy="no", seed=options.seed,
        per_device_train_batch_size=ROLLOUTS, gradient_accumulation_steps=1,  # an optimizer step a minibatch
        num_mini_batches=ROLLOUTS // MINIBATCH, num_ppo_epochs=options.epochs, kl_coef=KL, learning_rate=options.rate,
        lr_scheduler_type="constant", total_episodes=ROLLOUTS * options.steps, response_length=RESPONSE,
        local_rollout_forward_batch_size=ROLLOUTS, num_sample_generations=0, stop_token="eos", temperature=1.0,
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    reward = options.folder / "reward_model"
    models = [AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1) for _ in range(2)]
    trainer = PPOTrainer(
        args,
        processing_class=tokenizer,
        model=policy,
        ref_model=None,
        reward_model=ShareOfWanted() if options.learn else models[0],
        value_model=models[1],
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        callbacks=[Clock()],
    )
    trainer.train()


def grouped(options, tokenizer, policy, ids) -> None:
    """GRPOTrainer or RLOOTrainer, Hugging Face's generation."""
    import trl

    kind = options.trainer.upper()
    minibatches = ROLLOUTS // MINIBATCH
    args = getattr(trl, f"{kind}Config")(
        output_dir="/tmp/trl", report_to="none", use_cpu=True, bf16=False, save_strategy="no", seed=options.seed,
        per_device_train_batch_size=MINIBATCH, gradient_accumulation_steps=1, steps_per_generation=minibatches,
        num_iterations=options.epochs, num_generations=SAMPLES, max_completion_length=RESPONSE, beta=KL,
        learning_rate=options.rate, lr_scheduler_type="constant", temperature=1.0, logging_steps=1, disable_tqdm=True,
        max_steps=options.steps * minibatches * options.epochs, gradient_checkpointing=False,
    )  # fmt: skip
    prompts = [" ".join(f"w{id}" for id in prompt) for prompt in ids]

    def share(completion_ids, **_):
        return [sum(id % 16 == WANTED_ID for id in ids if id > END) / max(1, len(ids)) for ids in completion_ids]

    model = AutoModelForSequenceClassification.from_pretrained(options.folder / "reward_model", num_labels=1)
    trainer = getattr(trl, f"{kind}Trainer")(
        model=policy,
        reward_funcs=share if options.learn else model,
        reward_processing_classes=None if options.learn else tokenizer,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        callbacks=[Clock(minibatches * options.epochs)],
    )
    trainer.train()


if __name__ == "__main__":
    main()
