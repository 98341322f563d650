"""A whole step beside TRL's, and how fast each learns: the same models, prompts, rollouts, minibatches and epochs.

    python benchmarks/peers.py                                   # 1.1M parameters, PPO, fixed and natural lengths
    python benchmarks/peers.py --sizes 1M 10M --algorithms ppo grpo rloo --epochs 1 4
    python benchmarks/peers.py --learn --algorithms ppo          # mean reward after 10 to 60 steps

TRL is installed into environments of its own under build/peers (PPOTrainer in 1.12, its last release that has one;
GRPO and RLOO in 1.16) and given the better of one and two threads. Contenders take turns, round by round, some steps in
a row of which the first two are not counted; medians. The bound is all work divided by the cores, each piece alone on
one thread: bare `LLM.generate`, bare forward passes of reference, critic and reward model, and a bare update. The
workload is `workload.py`'s.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

from workload import MINIBATCH, PROMPT, RESPONSE, ROLLOUTS, SIZES, make_workload, words

from rlhf_ray.config import Config, load_config
from rlhf_ray.data.prompts import PromptStream
from rlhf_ray.models.policy import load_tokenizer
from rlhf_ray.roles.learner import Learner
from rlhf_ray.roles.placement import start_ray
from rlhf_ray.roles.weights import WeightsHandoff
from rlhf_ray.training.ppo import PPO, Roles
from rlhf_ray.types import Message, Prompt

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parent / "build/peers"
VERSIONS = {"ppo": "1.12.0", "grpo": "1.16.0", "rloo": "1.16.0"}
OURS = {"ppo": "gae", "grpo": "grpo", "rloo": "rloo"}
GROUP = 8
"""Samples a prompt of GRPO and RLOO."""
KL, RATE, IDLE_RATE = 5e-4, 1e-3, 1e-6
WARM_UP, COUNTED = 2, 6
LEARNT_AFTER = (10, 20, 30, 40, 60)
WANTED_OF_BOUND = 1.3
WANTED_OF_TRL = {"1M": 2.0, "10M": 1.6}
TRL_LEARNS = {
    "ppo": (0.07, 0.20, 0.62, 0.90, 0.97),
    "rloo": (0.12, 0.45, 0.84, 0.95, 0.99),
    "grpo": (0.15, 0.60, 0.94, 0.99, 1.00),
}
"""What TRL's trainers came to on this workload, at the steps of `LEARNT_AFTER`."""


def main() -> int:
    """Prints tables; exits 1 where something is less than wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1M"])
    parser.add_argument("--algorithms", nargs="+", choices=OURS, default=["ppo"])
    parser.add_argument("--epochs", nargs="+", type=int, default=[1])
    parser.add_argument("--lengths", nargs="+", choices=("fixed", "natural"), default=["fixed", "natural"])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--counted", type=int, default=COUNTED, help="steps of a round, after the first two")
    parser.add_argument("--threads", nargs="+", type=int, choices=(1, 2), default=[1, 2], help="TRL's")
    parser.add_argument("--learn", action="store_true", help="how fast each learns, instead of seconds")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trl", action="store_true", help="with --learn: TRL anew too, one seed")
    parser.add_argument("--pieces", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pieces:
        print(json.dumps(pieces_here(Path(options.pieces))))
        return 0
    return 0 if (learn if options.learn else seconds)(options) else 1


def seconds(options: argparse.Namespace) -> bool:
    """A line for each size, length, algorithm and number of epochs."""
    passed = True
    for size in options.sizes:
        for lengths in options.lengths:
            with tempfile.TemporaryDirectory() as folder:
                workload = make_workload(Path(folder), size, lengths=lengths)
                bound = pieces(workload) if lengths == "fixed" else None
                for algorithm in options.algorithms:
                    for epochs in options.epochs:
                        passed &= line(workload, size, lengths, algorithm, epochs, options, bound)
    return passed


def line(
    workload: Path,
    size: str,
    lengths: str,
    algorithm: str,
    epochs: int,
    options: argparse.Namespace,
    bound: dict[str, float] | None,
) -> bool:
    """One comparison."""
    count = WARM_UP + options.counted
    us: dict[str, Callable[[], list[float]]] = {
        name: partial(ours, workload, algorithm, epochs, count, staleness=staleness)
        for staleness, name in enumerate(("one after the other", "overlapped"))
    }
    peers: dict[str, Callable[[], list[float]]] = {
        f"TRL, threads: {threads}": partial(trl_seconds, workload, algorithm, epochs, count, threads=threads)
        for threads in options.threads
    }
    took: dict[str, list[float]] = {name: [] for name in us | peers}
    for _ in range(options.rounds):
        for name, run in (us | peers).items():
            took[name] += run()
    medians = {name: statistics.median(times) for name, times in took.items()}
    best = min(medians[name] for name in us)
    gain = min(medians[name] for name in peers) / best
    print(f"{size}, {lengths} lengths, {algorithm}, {epochs} epochs")
    for name, times in took.items():
        print(f"  {name}: {medians[name]:.2f} s ({min(times):.2f} to {max(times):.2f})")
    if bound is None:
        print(f"  TRL's best over ours: {gain:.2f} (wanted: {WANTED_OF_TRL[size]})", flush=True)
        return gain >= WANTED_OF_TRL[size]
    ideal = all_work(bound, algorithm, epochs) / 2
    each = ", ".join(f"{name} {value:.2f}" for name, value in bound.items())
    print(f"  TRL's best over ours: {gain:.2f}")
    print(f"  bound {ideal:.2f} s ({each}); ours is {best / ideal:.2f} of it (wanted: {WANTED_OF_BOUND})", flush=True)
    return best / ideal <= WANTED_OF_BOUND


def all_work(pieces: dict[str, float], algorithm: str, epochs: int) -> float:
    """Seconds of a step's pieces, one after the other; without a critic there is a third less to look at."""
    if algorithm == "ppo":
        return pieces["generate"] + pieces["forward"] + epochs * pieces["update"]
    return pieces["generate"] + pieces["forward"] * 2 / 3 + epochs * pieces["update, no critic"]


def learn(options: argparse.Namespace) -> bool:
    """Mean rewards after so many steps, by algorithm."""
    passed = True
    for algorithm in options.algorithms:
        curves = []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder:
                workload = make_workload(Path(folder), "1M", seed=seed)
                curves.append(curve(workload, algorithm, seed))
                if options.trl and seed == 0:
                    show(f"{algorithm}: TRL, seed 0", trl_curve(workload, algorithm))
            show(f"{algorithm}: ours, seed {seed}", curves[-1])
        means = [statistics.fmean(values) for values in zip(*curves, strict=True)]
        show(f"{algorithm}: ours, mean", means)
        show(f"{algorithm}: TRL, as published", TRL_LEARNS[algorithm])
        passed &= all(mine >= theirs - 0.005 for mine, theirs in zip(means, TRL_LEARNS[algorithm], strict=True))
    return passed


def show(name: str, values: Iterator[float] | list[float] | tuple[float, ...]) -> None:
    """A row."""
    print(f"{name}: " + " ".join(f"{value:.2f}" for value in values), flush=True)


def settings(algorithm: str, epochs: int, staleness: int, rate: float, seed: int, *more: str) -> Config:
    """A run's config for the workload; `more` wins."""
    prompts, samples = (ROLLOUTS, 1) if algorithm == "ppo" else (ROLLOUTS // GROUP, GROUP)
    return load_config(
        None,
        [
            f"run.id=peers-{seed}", f"seed={seed}", f"ppo.advantage={OURS[algorithm]}", f"rollout.prompts={prompts}",
            f"rollout.samples={samples}", f"rollout.max_tokens={RESPONSE}", f"rollout.max_staleness={staleness}",
            f"ppo.minibatch={MINIBATCH}", f"ppo.epochs={epochs}", f"ppo.learning_rate={rate}",
            f"ppo.critic_learning_rate={rate}", f"ppo.kl.coef={KL}", "ppo.kl.limit=1e9", "ppo.steps=100000",
            "ppo.missing_end_penalty=0", "model.context=512", *more,
        ],
    )  # fmt: skip


@contextmanager
def roles_for(workload: Path, config: Config, *, learns: bool = False) -> Iterator[Callable[[Config], PPO]]:
    """The roles of a run, ready; what is yielded makes the loop over them, with another config where that is wanted."""
    base = workload / "policy"
    tokenizer = load_tokenizer(base, context=config.model.context)
    ids = json.loads((workload / "prompts.json").read_text())
    prompts = [Prompt(f"p{i}", (Message("user", words(prompt)),), group=f"p{i}") for i, prompt in enumerate(ids)]
    rewards = None
    if learns:
        source = {"share": {"kind": "function", "of": "workload:share_of_wanted"}}
        rewards = type(config.rewards).model_validate({"sources": source})
    with start_ray(config) as placement:
        generators = placement.start_generators(base, weights_step=0)
        learner = placement.start_learner(partial(Learner.from_folder, base, config))
        scorers = placement.start_scorers(workload / "reward_model", rewards)
        placement.wait_ready()
        handoff = WeightsHandoff(learner, generators, vocabulary=len(tokenizer), context=config.model.context)
        roles = Roles(generators, scorers, learner, handoff)
        stream = PromptStream(prompts, seed=config.seed)
        yield lambda config: PPO(roles, prompts=stream, tokenizer=tokenizer, config=config)


def steps(workload: Path, config: Config, count: int, *, learns: bool) -> Iterator[tuple[float, float]]:
    """Seconds and mean reward of each of so many steps of our own loop."""
    with roles_for(workload, config, learns=learns) as make, closing(make(config)) as ppo:
        for step in range(count):
            start = time.perf_counter()
            metrics = ppo.step(step).metrics
            yield time.perf_counter() - start, metrics["objective/scores"]


def ours(workload: Path, algorithm: str, epochs: int, count: int, *, staleness: int) -> list[float]:
    """Seconds of our own steps but the first ones."""
    config = settings(algorithm, epochs, staleness, IDLE_RATE, seed=0)
    return [took for took, _ in steps(workload, config, count, learns=False)][WARM_UP:]


def curve(workload: Path, algorithm: str, seed: int) -> list[float]:
    """Mean reward after so many of our own steps."""
    config = settings(algorithm, 1, 0, RATE, seed)
    rewards = [reward for _, reward in steps(workload, config, LEARNT_AFTER[-1], learns=True)]
    return [rewards[after - 1] for after in LEARNT_AFTER]


def trl(workload: Path, algorithm: str, *arguments: str, threads: int) -> list[dict[str, float]]:
    """What TRL's trainer tells, step by step."""
    command = [python_of(VERSIONS[algorithm]), HERE / "peer_trl.py", workload, algorithm, *arguments]
    found = subprocess.run(
        [*command, "--threads", str(threads)],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if found.returncode:
        raise SystemExit(found.stderr[-3000:])
    return [json.loads(row) for row in found.stdout.splitlines() if row.startswith('{"step"')]


def trl_seconds(workload: Path, algorithm: str, epochs: int, count: int, *, threads: int) -> list[float]:
    """Seconds of its steps but the first ones."""
    rows = trl(workload, algorithm, "--steps", str(count), "--epochs", str(epochs), threads=threads)
    return [row["seconds"] for row in rows if "seconds" in row][WARM_UP:]


def trl_curve(workload: Path, algorithm: str) -> list[float]:
    """Mean reward after so many of its steps."""
    rows = trl(workload, algorithm, "--steps", str(LEARNT_AFTER[-1]), "--learn", "--rate", str(RATE), threads=2)
    rewards = [row["reward"] for row in rows if "reward" in row]
    return [rewards[after - 1] for after in LEARNT_AFTER]


def python_of(version: str) -> Path:
    """The Python of an environment that holds this TRL, made where there is none."""
    folder = ENVIRONMENTS / f"trl-{version}"
    python = folder / "bin/python"
    if not python.exists():
        uv = Path(sys.executable).with_name("uv")
        unneeded = ENVIRONMENTS / "overrides.txt"
        unneeded.parent.mkdir(parents=True, exist_ok=True)
        names = ("torchvision", "torchaudio", "torchcodec")  # their CUDA builds break `import transformers`
        unneeded.write_text("".join(f"{name}; sys_platform == 'never'\n" for name in names))
        find_links = os.environ.get("UV_FIND_LINKS", os.environ.get("PIP_FIND_LINKS", ""))
        environment = {**os.environ, "UV_FIND_LINKS": find_links}
        subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True, timeout=120)
        packages = [f"trl=={version}", "torch==2.13.0+cpu"]
        subprocess.run(
            [uv, "pip", "install", "-q", "--python", python, "--overrides", unneeded, *packages],
            check=True,
            timeout=900,
            env=environment,
        )
    return python


def pieces(workload: Path) -> dict[str, float]:
    """Seconds of each piece of a step's work, alone, on one thread, in a process of its own."""
    found = subprocess.run(
        [sys.executable, __file__, "--pieces", str(workload)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    if found.returncode:
        raise SystemExit(found.stderr[-3000:])
    return dict(json.loads(found.stdout.splitlines()[-1]))


def pieces_here(workload: Path) -> dict[str, float]:
    """The same, in this process."""
    import torch
    from torch.nn import functional
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from vllm import SamplingParams

    from rlhf_ray.roles.vllm_engine import VllmEngine

    torch.set_num_threads(1)
    engine = VllmEngine(workload / "policy", context=512).llm
    prompts = [{"prompt_token_ids": ids} for ids in json.loads((workload / "prompts.json").read_text())[:ROLLOUTS]]
    sampling = SamplingParams(temperature=1.0, max_tokens=RESPONSE, logprobs=0, detokenize=False, ignore_eos=True)
    policy = AutoModelForCausalLM.from_pretrained(workload / "policy", dtype=torch.float32)
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(workload / "reward_model", num_labels=1) for _ in range(2)
    )
    optimizers = [torch.optim.AdamW(model.parameters(), lr=IDLE_RATE) for model in (policy, critic)]
    ids = torch.randint(2, 1000, (ROLLOUTS, PROMPT + RESPONSE))

    @torch.no_grad()
    def forward() -> None:
        for model in (policy, critic, reward):  # the reference is as large as the policy
            for rows in ids.split(MINIBATCH):
                model(rows)

    def update(*, with_critic: bool) -> None:
        for rows in ids.split(MINIBATCH):
            loss = functional.cross_entropy(policy(rows).logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
            if with_critic:
                loss = loss + critic.score(critic.model(rows).last_hidden_state).square().mean()
            loss.backward()
            for optimizer in optimizers if with_critic else optimizers[:1]:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    work: dict[str, Callable[[], object]] = {
        "generate": lambda: engine.generate(prompts, sampling, use_tqdm=False),
        "forward": forward,
        "update": partial(update, with_critic=True),
        "update, no critic": partial(update, with_critic=False),
    }
    took: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(6):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if turn:
                took[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in took.items()}


if __name__ == "__main__":
    raise SystemExit(main())
