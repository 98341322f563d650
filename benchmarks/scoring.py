"""What do the ways to a reward cost, beside the bare model on the same texts?

    python benchmarks/scoring.py                  # a random reward model of 3M parameters, 64 answers a prompt
    python benchmarks/scoring.py --answers 4
    python benchmarks/scoring.py --hidden 512 --layers 8 --texts 512

Bare is transformers by hand: texts sorted by length, batches of 64, one thread. Beside it, with as many threads: the
`Scorer` that PPO asks, an actor of Ray's, and the service, asked over HTTP for a prompt's answers at a time, 256 texts
under way. What the answers to one prompt begin with, ours read once. All three alternate; the median over rounds of
what each does in a second over what bare does in the same round has to reach 0.9, and the scores have to be the same
to 1e-5.
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import aiohttp
import torch
from rewards_and_feedback import served  # the files beside this one
from serving import TEXT, WORDS
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.config import load_config
from rlhf_ray.models.reward import render
from rlhf_ray.roles.placement import Placement
from rlhf_ray.types import Exchange, Message, Prompt

BATCH, UNDER_WAY = 64, 256
WANTED, SAME = 0.9, 1e-5
Score = Callable[[], list[float]]


def main() -> int:
    """Prints texts a second and ratios; exits 1 where one is below what is wanted, or scores differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--texts", type=int, default=2048)
    parser.add_argument("--answers", type=int, default=BATCH, help=f"to each prompt; at most {BATCH}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    if not 1 <= options.answers <= BATCH:
        parser.error(f"--answers: 1 to {BATCH}, for a request may bring no more")
    options.haproxy = False
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(options.threads)
    draw = random.Random(0)
    exchanges: list[Exchange] = []
    while len(exchanges) < options.texts:
        text = f"{TEXT} {' '.join(draw.choices(WORDS, k=4))}"
        prompt = Prompt(text, (Message("user", text),), text)
        exchanges += [
            Exchange(prompt, " ".join(draw.choices(WORDS, k=draw.randint(8, 40)))) for _ in range(options.answers)
        ]
    with tempfile.TemporaryDirectory() as root, served(Path(root), options) as config:
        folder = Path(root) / "reward_model"
        placement = Placement(load_config(None, [f"resources.threads={options.threads}"]), started=False)
        scorers = placement.start_scorers(folder)
        placement.wait_ready()
        url = f"http://{config.host}:{config.port}"
        ways: dict[str, Score] = {
            "bare": bare(folder, exchanges),
            "Scorer": lambda: list(scorers.score(exchanges)),
            "service": lambda: asyncio.run(ask(url, exchanges, options.answers)),
        }
        rates: dict[str, list[float]] = {name: [] for name in ways}
        scores: dict[str, list[float]] = {}
        for turn in range(-1, options.rounds):  # the first one only warms up
            for name, score in ways.items():
                began = time.perf_counter()
                scores[name] = score()
                if turn >= 0:
                    rates[name].append(len(exchanges) / (time.perf_counter() - began))
        placement.stop_actors()
    good = True
    for name, found in rates.items():
        ratio = statistics.median(one / bare for one, bare in zip(found, rates["bare"], strict=True))
        apart = max(abs(one - other) for one, other in zip(scores[name], scores["bare"], strict=True))
        good &= ratio >= WANTED and apart <= SAME
        spread = f"{min(found):.0f} to {max(found):.0f}"
        print(f"{name:<10}{statistics.median(found):>8.0f} texts/s ({spread}), {ratio:.2f} of bare, apart {apart:.1e}")
    print(f"wanted: {WANTED} of bare, {SAME} apart at most")
    return 0 if good else 1


def bare(folder: Path, exchanges: list[Exchange]) -> Score:
    """transformers and nothing else."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
    texts = [render(tokenizer, exchange) for exchange in exchanges]

    @torch.inference_mode()
    def score() -> list[float]:
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        order = sorted(range(len(ids)), key=lambda row: len(ids[row]))
        found = torch.zeros(len(ids))
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            found[rows] = model(**batch).logits[:, 0]
        return found.tolist()

    return score


async def ask(url: str, exchanges: list[Exchange], answers: int) -> list[float]:
    """Over HTTP, a request a prompt, several under way."""
    starts = range(0, len(exchanges), answers)
    found: dict[int, list[float]] = {}
    waiting = iter(starts)

    async def client(http: aiohttp.ClientSession) -> None:
        for start in waiting:
            some = exchanges[start : start + answers]
            asked = {"prompt": some[0].prompt.id, "completions": [exchange.response for exchange in some]}
            async with http.post("/v1/rewards", json=asked) as answer:
                answer.raise_for_status()
                found[start] = (await answer.json())["rewards"]

    async with aiohttp.ClientSession(url) as http:
        await asyncio.gather(*(client(http) for _ in range(UNDER_WAY // answers)))
    return [reward for start in starts for reward in found[start]]


if __name__ == "__main__":
    raise SystemExit(main())
