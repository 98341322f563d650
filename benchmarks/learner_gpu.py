"""How fast is the learner on one GPU, how much of the GPU's arithmetic does it use, and how much memory does it take?

    python benchmarks/learner_gpu.py                        # every form of every shape that fits
    python benchmarks/learner_gpu.py --shape 0.5B --rounds 5

Random weights in the shapes of two open models, random rollouts of ragged lengths. It needs torch, transformers, peft
and this package, and neither Ray nor vLLM. Each form prints one line; the bare loop stands beside the first.

- tokens/s: of prompts and responses, padding not counted, in `update`; every network that learns goes over all of them.
- MFU: 4 FLOP a weight and token and 2 more a weight that learns, and attention's, over what the GPU could do in
  bfloat16 (`--peak`; Chowdhery et al. 2022, arXiv:2204.02311, appendix B). Activations computed twice count once.
- peak: memory that torch held at most, over `prepare` and `update`.
"""

import argparse
import gc
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, Qwen2Config

from rlhf_ray.config import Config, load_config
from rlhf_ray.models.lora import with_adapter
from rlhf_ray.models.policy import train_tokenizer
from rlhf_ray.roles.budget import TokenBudget
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.loading import recompute_activations
from rlhf_ray.roles.networks import Networks
from rlhf_ray.roles.ranks import Ranks, shard_alone
from rlhf_ray.types import Rollout, Sampling, Scored

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "vocab_size": 1000, "tie_word_embeddings": True,
    },
    "0.5B": {
        "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14,
        "num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152_064, "tie_word_embeddings": False,
    },
}  # fmt: skip
PEAK = 989.0
"""TFLOP/s in bfloat16 without sparsity, of an H100 and an H200 (NVIDIA's data sheets)."""
BFLOAT16 = ["resources.learner_dtype=bfloat16", "rollout.tolerance=0.1"]
ALONE = ["ppo.advantage=rloo", "rollout.samples=2"]
"""The policy alone: no critic."""


@dataclass(frozen=True, slots=True)
class Form:
    """One way to hold and to compute the networks."""

    name: str
    shape: str
    settings: list[str]
    padded: bool = False


FORMS = [
    Form("policy and critic", "tiny", BFLOAT16),
    Form("LoRA", "tiny", [*BFLOAT16, *ALONE, "lora.rank=16"]),
    Form("policy and critic", "0.5B", BFLOAT16),
    Form("padded instead of packed", "0.5B", BFLOAT16, padded=True),
    Form("float32", "0.5B", []),
    Form("recomputed activations", "0.5B", [*BFLOAT16, "resources.recompute=true"]),
    Form("8-bit optimizer", "0.5B", [*BFLOAT16, "resources.optimizer_bits=8"]),
    Form("optimizer and reference offloaded", "0.5B", [*BFLOAT16, "resources.learner_offload=[optimizer,reference]"]),
    Form("LoRA", "7B", [*BFLOAT16, *ALONE, "lora.rank=32", "resources.recompute=true"]),
    Form(
        "all weights, 8-bit optimizer, reference offloaded", "7B",
        [*BFLOAT16, *ALONE, "resources.optimizer_bits=8", "resources.learner_offload=[reference]",
         "resources.recompute=true"],
    ),
]  # fmt: skip


def main() -> int:
    """One line a form; 1 where one failed."""
    parser = argparse.ArgumentParser(description="The learner on one GPU.")
    parser.add_argument("--shape", nargs="*", default=["0.5B", "7B"], choices=SHAPES)
    parser.add_argument("--form", nargs="*", default=[""], help="only forms whose name holds one of these")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=16_384, help="resources.learner_tokens")
    parser.add_argument("--peak", type=float, default=PEAK, help="the GPU's TFLOP/s in bfloat16")
    options = parser.parse_args()
    if not torch.cuda.is_available() and options.shape != ["tiny"]:
        print("no GPU here: not run (--shape tiny runs anywhere)")
        return 0
    print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", f"torch {torch.__version__}")
    failed = False
    for shape in options.shape:
        for number, form in enumerate(form for form in FORMS if form.shape == shape):
            if not any(part in form.name for part in options.form):
                continue
            try:
                measure(form, options, beside_bare_loop=number == 0 and shape != "7B")  # which would not fit
            except Exception as error:  # a form that does not fit is a result, and the others are wanted all the same
                failed = True
                print(f"{form.shape} {form.name}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
            gc.collect()
            torch.cuda.empty_cache()
    return int(failed)


def measure(form: Form, options: argparse.Namespace, *, beside_bare_loop: bool) -> None:
    """Prints what a form's prepare and update cost."""
    config = load_config(None, [
        "run.id=gpu", "rollout.prompts=64", "ppo.minibatch=32", "ppo.epochs=1", "rollout.max_tokens=1024",
        "model.context=4096", "ppo.kl.limit=1e9", f"resources.learner_tokens={options.tokens}", *form.settings,
        *(["rollout.prompts=32"] if "rollout.samples=2" in form.settings else []),
    ])  # fmt: skip
    rollouts = make_rollouts(SHAPES[form.shape]["vocab_size"])
    real = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(["any text"], vocabulary=300, context=4096).save_pretrained(folder)
        learner = make_learner(form, config, Path(folder))
    reset_peak()
    seconds: dict[str, list[float]] = {"prepare": [], "update": []}
    scored = Scored(rollouts, [float(len(rollout.response_ids) % 7) for rollout in rollouts])
    for turn in range(options.rounds + 1):
        start = now()
        batch = learner.prepare(scored)
        middle = now()
        learner.update(batch)
        if turn:  # the first one warms up
            seconds["prepare"].append(middle - start)
            seconds["update"].append(now() - middle)
    took = {name: statistics.median(times) for name, times in seconds.items()}
    mfu = flop(learner, rollouts) / took["update"] / (options.peak * 1e12)
    print(
        f"{form.shape} {form.name}: prepare {took['prepare']:.2f} s, update {took['update']:.2f} s, "
        f"{real / took['update']:,.0f} tokens/s, MFU {mfu:.1%}, peak {peak() / 2**30:.1f} GiB",
        flush=True,
    )
    if beside_bare_loop:
        bare = bare_loop(form, config, rollouts, options.rounds)
        print(f"{form.shape} bare loop: update {bare:.2f} s; ours over it {took['update'] / bare:.2f}", flush=True)


def make_learner(form: Form, config: Config, tokenizer: Path) -> Learner:
    """Random networks, made where they are used: writing 7 billion weights to a disk first would take minutes."""
    resources, lora = config.resources, config.lora
    dtype = torch.bfloat16 if lora.rank and resources.learner_dtype == "bfloat16" else torch.float32
    policy = with_adapter(random_model(AutoModelForCausalLM, form.shape, dtype), lora, use="policy", seed=0)
    critic = None
    if config.ppo.advantage == "gae":
        critic = with_adapter(
            random_model(AutoModelForTokenClassification, form.shape, dtype, num_labels=1), lora, use="critic", seed=0
        )
    if resources.recompute:
        for model in (policy, critic) if critic is not None else (policy,):
            recompute_activations(model)
    reference = None if lora.rank else random_model(AutoModelForCausalLM, form.shape, torch.bfloat16)
    networks = Networks(
        policy,
        reference,
        critic,
        Sampling(max_tokens=config.rollout.max_tokens),
        TokenBudget(resources.learner_tokens),
        shard_alone() if resources.learner_offload else Ranks(),
        resources,
    )
    if form.padded:
        for model in (networks.policy, networks.reference, networks.critic):
            model.set_attn_implementation("sdpa")
        networks.packed = False
    return Learner(networks, config=config, base=tokenizer)


def random_model(kind: Any, shape: str, dtype: torch.dtype, **more: Any) -> Any:
    """Of a shape, on the GPU."""
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPES[shape], max_position_embeddings=4096, pad_token_id=0, eos_token_id=1, bos_token_id=None, **more
    )
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return kind.from_config(config, dtype=dtype).eval()


def make_rollouts(vocabulary: int) -> list[Rollout]:
    """64: prompts of 128 to 512 tokens, responses of 64 to 1,024."""
    draw = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=draw))
        return tuple(torch.randint(5, vocabulary, (length,), generator=draw).tolist())

    rows = ((ids(128, 512), ids(64, 1024)) for _ in itertools.count())
    return [
        Rollout(f"r{i}", f"p{i // 2}", prompt, response, (-1.0,) * len(response), 0, "stop")
        for i, (prompt, response) in enumerate(itertools.islice(rows, 64))
    ]


def flop(learner: Learner, rollouts: list[Rollout]) -> float:
    """Of an update's passes over every rollout once, by the networks that learn."""
    lengths = [len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts]
    total = 0.0
    for model in learner.learning.values():
        weights = sum(parameter.numel() for parameter in model.parameters())
        learnt = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        config = model.config
        attention = 6 * config.num_hidden_layers * config.hidden_size * sum(n * n for n in lengths)  # half is masked
        total += (4 * weights + 2 * learnt) * sum(lengths) + attention
    return total


def bare_loop(form: Form, config: Config, rollouts: list[Rollout], rounds: int) -> float:
    """Median seconds of what one writes by hand: autocast, as many tokens in rows of their mean length, AdamW."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [
        random_model(AutoModelForCausalLM, form.shape, torch.float32),
        random_model(AutoModelForTokenClassification, form.shape, torch.float32, num_labels=1),
    ][: 2 if config.ppo.advantage == "gae" else 1]
    optimizers = [torch.optim.AdamW(model.parameters(), fused=True) for model in models]
    length = round(statistics.fmean(len(r.prompt_ids) + len(r.response_ids) for r in rollouts))
    ids = torch.randint(5, SHAPES[form.shape]["vocab_size"], (len(rollouts), length), device=device)
    rows = max(1, config.resources.learner_tokens // length)
    times = []
    for turn in range(rounds + 1):
        start = now()
        for minibatch in ids.split(config.ppo.minibatch):
            for part in minibatch.split(rows):
                with torch.autocast(device.type, dtype=torch.bfloat16):
                    outputs = [model(part).logits for model in models]
                loss = torch.nn.functional.cross_entropy(
                    outputs[0][:, :-1].flatten(0, 1).float(), part[:, 1:].flatten()
                )
                sum([loss, *(values.float().square().mean() for values in outputs[1:])]).backward()
                del outputs, loss
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if turn:
            times.append(now() - start)
    return statistics.median(times)


def now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def reset_peak() -> None:
    """From here on `peak` counts."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak() -> int:
    """Bytes; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


if __name__ == "__main__":
    sys.exit(main())
