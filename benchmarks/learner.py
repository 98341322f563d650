"""What does an update of the learner cost beside a bare torch loop, and beside naive code in memory?

    python benchmarks/learner.py runs/demo               # seconds, on a demo run's own prompts and answers
    python benchmarks/learner.py runs/demo --memory      # peak memory of a step at 100M parameters, vocabulary 50,000
    python benchmarks/learner.py runs/demo --saving      # how long a step waits for a checkpoint

Seconds: policy and critic, forward, backward and AdamW. The bare loop does that over as many tokens without padding, in
as many minibatches, with cross-entropy and a squared error for losses. Rounds alternate in one process; medians.
Memory: each form in a process of its own, whose peak is read at its end. The naive form makes all logits of a batch.
Saving: `Learner.save` beside a bare copy of the same tensors, and beside waiting until they are on the disk.
"""

import argparse
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.config import Config, load_config
from rlhf_ray.models.policy import encode_exchange, load_tokenizer, save_policy
from rlhf_ray.roles.batch import Batch
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.optimizers import moments_of
from rlhf_ray.training.recipe import make_recipe
from rlhf_ray.training.run_folder import existing_run
from rlhf_ray.types import Exchange, Rollout, Scored

SIZES = {"1M": (128, 4, 384), "10M": (384, 6, 1152)}
"""Width, depth and feed-forward width; the vocabulary is the run's."""
WANTED = {"1M": 1.15, "10M": 1.10}
WANTED_PADDING, WANTED_MEMORY, WANTED_STALL = 1.10, 0.6, 1.5


def main() -> int:
    """Prints ratios; exits 1 where one is above what is wanted."""
    parser = argparse.ArgumentParser(description="The learner beside a bare torch loop.")
    parser.add_argument("run", type=Path, help="a finished demo run")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--saving", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    measured = memory if options.memory else saving if options.saving else seconds
    return 0 if measured(options) else 1


def seconds(options: argparse.Namespace) -> bool:
    """Update against bare loop, size by size."""
    rollouts, config = rollouts_of(options.run)
    passed = True
    for name, (hidden, layers, intermediate) in SIZES.items():
        with tempfile.TemporaryDirectory() as folder:
            base = random_policy(Path(folder), options.run, hidden=hidden, layers=layers, intermediate=intermediate)
            learner = Learner.from_folder(base, config)
            batch = learner.prepare(Scored(rollouts, scores(rollouts)))
            bare = bare_loop(Learner.from_folder(base, config), batch, config)
            ours, theirs = interleaved(lambda: learner.update(batch), bare, rounds=options.rounds)  # noqa: B023
        ratio = ours / theirs
        passed &= ratio <= WANTED[name]
        count = sum(parameter.numel() for parameter in learner.networks.policy.parameters())
        print(
            f"{name} ({count / 1e6:.1f}M): update {ours:.3f} s, bare loop {theirs:.3f} s, ratio {ratio:.2f} "
            f"(wanted: {WANTED[name]})"
        )
    padding = padded_over_real(learner, batch, config)
    print(f"padded over real tokens {padding:.3f} (wanted: {WANTED_PADDING})")
    return passed and padding <= WANTED_PADDING


def bare_loop(learner: Learner, batch: Batch, config: Config) -> Callable[[], None]:
    """The same networks and optimizers, over as many tokens without padding."""
    policy, critic = learner.networks.policy, learner.networks.critic
    assert critic is not None
    for model in (policy, critic):
        model.set_attn_implementation("sdpa")
    rows, real = len(batch.logprobs), int(batch.tokens.attention.sum())
    length = round(real / rows)
    minibatches = config.ppo.epochs * rows // config.ppo.minibatch
    ids = torch.randint(5, 500, (config.ppo.minibatch, length), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        for _ in range(minibatches):
            for optimizer in learner.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            logits = policy(ids).logits[:, :-1]
            loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss = loss + critic(ids).logits.square().mean()
            loss.backward()
            for optimizer in learner.optimizers.values():
                optimizer.step()

    return run


def interleaved(ours: Callable[[], object], theirs: Callable[[], object], *, rounds: int) -> tuple[float, float]:
    """Median seconds of each, after one round that only warms up."""
    took: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):
        for function, times in zip((ours, theirs), took, strict=True):
            start = time.perf_counter()
            function()
            if turn:
                times.append(time.perf_counter() - start)
    return statistics.median(took[0]), statistics.median(took[1])


def padded_over_real(learner: Learner, batch: Batch, config: Config) -> float:
    """Tokens that an update's forward passes hold, over those that are a rollout's."""
    held = 0

    def count(_module: object, arguments: tuple[torch.Tensor, ...], keywords: dict[str, torch.Tensor]) -> None:
        nonlocal held
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        assert ids is not None
        held += ids.numel()

    hook = learner.networks.policy.base_model.register_forward_pre_hook(count, with_kwargs=True)
    learner.update(batch)
    hook.remove()
    return held / (config.ppo.epochs * int(batch.tokens.attention.sum()))


def rollouts_of(run: Path) -> tuple[list[Rollout], Config]:
    """A step's rollouts out of a run's own prompts and answers, and its config."""
    folder, config = existing_run(run)
    tokenizer = load_tokenizer(folder.base_policy, context=config.model.context)
    answers = folder.read_json("evaluation_before.json")["answers"]
    rollouts = []
    for prompt, texts in list(zip(make_recipe(config).held_out_prompts, answers, strict=True))[
        : config.rollout.prompts
    ]:
        ids, length = encode_exchange(tokenizer, Exchange(prompt, texts[0]))
        response = tuple(ids[length:][: config.rollout.max_tokens])
        rollouts.append(
            Rollout(prompt.id, prompt.id, tuple(ids[:length]), response, (-1.0,) * len(response), 0, "stop")
        )
    return rollouts, load_config(None, [f"run.id={run.name}", "ppo.kl.limit=1e9"])


def scores(rollouts: list[Rollout]) -> list[float]:
    """Any will do."""
    return [float(len(rollout.response_ids) % 7) for rollout in rollouts]


def random_policy(
    folder: Path, run: Path, *, hidden: int, layers: int, intermediate: int, vocabulary: int | None = None
) -> Path:
    """A random Llama with the run's tokenizer."""
    tokenizer = load_tokenizer(existing_run(run)[0].base_policy)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer), hidden_size=hidden, intermediate_size=intermediate,
        num_hidden_layers=layers, num_attention_heads=hidden // 32, max_position_embeddings=512,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    save_policy(folder / "policy", LlamaForCausalLM(config), tokenizer)
    return folder / "policy"


def saving(options: argparse.Namespace) -> bool:
    """What a step waits for a checkpoint, of the larger size."""
    rollouts, config = rollouts_of(options.run)
    hidden, layers, intermediate = SIZES["10M"]
    with tempfile.TemporaryDirectory() as folder:
        base = random_policy(Path(folder), options.run, hidden=hidden, layers=layers, intermediate=intermediate)
        learner = Learner.from_folder(base, config)
        learner.update(learner.prepare(Scored(rollouts, scores(rollouts))))  # from here on there are moments
        held = [
            tensor
            for name, model in learner.learning.items()
            for tensor in (*model.state_dict().values(), *moments_of(learner.optimizers[name]).values())
        ]
        took: dict[str, list[float]] = {"copy": [], "stall": [], "written": []}
        for turn in range(options.rounds + 1):
            start = time.perf_counter()
            copies = [tensor.to("cpu", copy=True) for tensor in held]
            copied = time.perf_counter()
            del copies
            begun = time.perf_counter()
            learner.save(Path(folder) / "checkpoints", turn + 1)
            stalled = time.perf_counter()
            learner.finish_saving()
            if turn:
                for name, seconds in zip(
                    took, (copied - start, stalled - begun, time.perf_counter() - begun), strict=True
                ):
                    took[name].append(seconds)
    copy, stall, written = (statistics.median(times) for times in took.values())
    size = sum(tensor.nbytes for tensor in held) / 2**20
    print(
        f"{size:.0f} MiB: a step waits {stall * 1000:.0f} ms, the bare copy takes {copy * 1000:.0f} ms "
        f"({stall / copy:.2f}), until all is on the disk {written * 1000:.0f} ms"
    )
    return stall <= WANTED_STALL * copy


def memory(options: argparse.Namespace) -> bool:
    """Peak memory of prepare and update, of the learner and of the naive form."""
    with tempfile.TemporaryDirectory() as folder:
        base = random_policy(Path(folder), options.run, hidden=640, layers=7, intermediate=1920, vocabulary=50_000)
        spawn = multiprocessing.get_context("spawn")
        peaks = {}
        for form in ("nothing", "naive", "ours"):
            ends, start = spawn.Pipe(duplex=False)
            process = spawn.Process(target=one_step, args=(form, base, options.run, options.threads, start))
            process.start()
            peaks[form] = ends.recv()
            process.join()
            print(f"{form}: peak {peaks[form] / 2**30:.2f} GiB", flush=True)
    ratio = peaks["ours"] / peaks["naive"]
    print(f"memory of a whole step: {ratio:.2f} of the naive form's (wanted: {WANTED_MEMORY})")
    return ratio <= WANTED_MEMORY


def one_step(form: str, base: Path, run: Path, threads: int, out: object) -> None:
    """In a process of its own: sends its peak memory in bytes."""
    torch.set_num_threads(threads)
    rollouts, config = rollouts_of(run)
    config = config.model_copy(update={"ppo": config.ppo.model_copy(update={"epochs": 1})})
    learner = Learner.from_folder(base, config)
    if form == "ours":
        learner.update(learner.prepare(Scored(rollouts, scores(rollouts))))
    elif form == "naive":
        naive_step(learner, rollouts)
    out.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)  # type: ignore[attr-defined]


def naive_step(learner: Learner, rollouts: list[Rollout]) -> None:
    """What one writes first: all logits of the batch, then all of each minibatch."""
    from rlhf_ray.roles.batch import collate_rollouts

    networks, size = learner.networks, learner.ppo.minibatch
    assert networks.critic is not None
    assert networks.reference is not None
    for network in (networks.policy, networks.critic, networks.reference):
        network.set_attn_implementation("sdpa")
    tokens = collate_rollouts(rollouts, pad_id=learner.pad_id)

    def logprobs_and_entropy(model: object, ids: torch.Tensor, attention: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logprobs = model(ids, attention_mask=attention).logits[:, :-1].log_softmax(-1)  # type: ignore[operator]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        return logprobs.gather(-1, ids[:, 1:].unsqueeze(-1)).squeeze(-1), entropy

    with torch.no_grad():
        old, _ = logprobs_and_entropy(networks.policy, tokens.ids, tokens.attention)
        logprobs_and_entropy(networks.reference, tokens.ids, tokens.attention)
        networks.critic(tokens.ids, attention_mask=tokens.attention)
    for start in range(0, len(rollouts), size):
        rows = slice(start, start + size)
        for optimizer in learner.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        new, entropy = logprobs_and_entropy(networks.policy, tokens.ids[rows], tokens.attention[rows])
        values = networks.critic(tokens.ids[rows], attention_mask=tokens.attention[rows]).logits
        ((new - old[rows]).exp().mean() - 0.0 * entropy.mean() + values.square().mean()).backward()
        for optimizer in learner.optimizers.values():
            optimizer.step()


if __name__ == "__main__":
    sys.exit(main())
