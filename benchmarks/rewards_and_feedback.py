"""What do the other two parts of the service bear, through Ray Serve and its door?

    python benchmarks/rewards_and_feedback.py               # a random reward model of about 3M parameters
    python benchmarks/rewards_and_feedback.py --haproxy     # with HAProxy in front, as docs/operations.md has it

Rewards: requests of one answer each, from one client who waits for each, and from 32 at once; the ratio has to be at
least 5, for what waits together is scored together. Feedback: ratings on disk a second, from 32 clients; at least 100.
Rounds alternate, and the median counts. What batching gains the bare model is printed first: on a CPU one answer of a
large model keeps a core as busy as 32 do, so no service can gain more there than that and what its other cores do.
"""

import argparse
import asyncio
import os
import random
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import torch
from serving import TEXT, WORDS, free_port, make_model  # the file beside this one

from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.models.registry import Registry
from rlhf_ray.models.reward import RewardModel, new_reward_model
from rlhf_ray.serving.settings import LimitSettings, RewardSettings, ServiceConfig

CLIENTS = 32
WANTED_RATIO, WANTED_ACKS = 5.0, 100.0
Send = Callable[[aiohttp.ClientSession, random.Random], Awaitable[None]]


def main() -> int:
    """Prints medians and ratios; exits 1 where one is below what is wanted."""
    parser = argparse.ArgumentParser(description="Rewards and feedback through Ray Serve.")
    parser.add_argument("--hidden", type=int, default=128, help="512 and 8 layers: about 30M parameters")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=8, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="of the reward model; the clients need the other core")
    parser.add_argument("--haproxy", action="store_true", help="HAProxy in place of Serve's own proxy")
    options = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1"}
    if options.haproxy:
        os.environ |= {"RAY_SERVE_ENABLE_HA_PROXY": "1", "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1"}
    with tempfile.TemporaryDirectory() as root, served(Path(root), options) as config:
        rates = asyncio.run(measure(f"http://{config.host}:{config.port}", options))
        with FeedbackStore(config.store, read_only=True) as store:
            print(f"{store.count()} ratings on disk")
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        print(f"{name:<24}{medians[name]:>9.1f} /s, {min(found):.1f} to {max(found):.1f} in {len(found)} rounds")
    ratio = medians[f"rewards, {CLIENTS} clients"] / medians["rewards, one by one"]
    print(f"rewards: {CLIENTS} clients at once get {ratio:.1f} times what one gets (wanted: {WANTED_RATIO:g})")
    print(f"feedback: {medians['feedback']:.0f} acknowledgements/s (wanted: {WANTED_ACKS:g})")
    return 0 if ratio >= WANTED_RATIO and medians["feedback"] >= WANTED_ACKS else 1


@contextmanager
def served(root: Path, options: argparse.Namespace) -> Iterator[ServiceConfig]:
    """Reward model and feedback on Ray Serve."""
    import ray
    from ray import serve

    from rlhf_ray.serving.app import application

    policy = make_model(root / "policy", hidden=options.hidden, layers=options.layers)
    model = new_reward_model(policy, "decoder")
    model.save(root / "reward_model")
    gain = batching_gain(model, options.threads)
    print(f"the bare model scores {CLIENTS} at once {gain:.1f} times as fast as one by one")
    registry = Registry(root / "registry")
    version = registry.publish("reward_model", root / "reward_model", lineage={})
    registry.promote("reward_model", version.number, by="benchmark")
    config = ServiceConfig(
        registry=registry.root,
        store=str(root / "feedback.db"),
        keys=str(root / "keys.db"),
        port=free_port(),
        parts=frozenset({"reward", "feedback"}),
        reward=RewardSettings(threads=options.threads),
        limits=LimitSettings(requests_per_minute=10_000_000),
    )
    ray.init(num_cpus=options.threads + 4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(application(config), name="benchmark")
        yield config
    finally:
        serve.shutdown()
        ray.shutdown()


def batching_gain(model: RewardModel, threads: int, repeats: int = 20) -> float:
    """Time of one answer by itself over its share of a batch's."""
    torch.set_num_threads(threads)
    draw = random.Random(0)
    texts = [f"{TEXT} {' '.join(draw.choices(WORDS, k=12))}" for _ in range(CLIENTS)]
    seconds = {}
    for size in (1, CLIENTS):
        model.score_texts(texts[:size])
        start = time.perf_counter()
        for _ in range(repeats):
            model.score_texts(texts[:size])
        seconds[size] = (time.perf_counter() - start) / size
    return seconds[1] / seconds[CLIENTS]


async def measure(url: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Requests answered a second, round by round."""
    kinds: dict[str, tuple[Send, int]] = {
        "rewards, one by one": (ask_reward, 1),
        f"rewards, {CLIENTS} clients": (ask_reward, CLIENTS),
        "feedback": (send_rating, CLIENTS),
    }
    rates: dict[str, list[float]] = {name: [] for name in kinds}
    async with aiohttp.ClientSession(url) as http:
        for turn in range(-1, options.rounds):  # the first one only warms up
            for name, (send, clients) in kinds.items():
                seconds = options.seconds if turn >= 0 else 2
                rate = await one_round(http, send, clients=clients, seconds=seconds, seed=turn)
                if turn >= 0:
                    rates[name].append(rate)
                    print(f"round {turn}: {name:<24}{rate:>9.1f} /s", flush=True)
    return rates


async def one_round(http: aiohttp.ClientSession, send: Send, *, clients: int, seconds: float, seed: int) -> float:
    """All clients at once, each with one request after another."""
    start = time.perf_counter()

    async def client(number: int) -> int:
        draw, done = random.Random(f"{seed}/{number}"), 0
        while time.perf_counter() - start < seconds:
            await send(http, draw)
            done += 1
        return done

    counts = await asyncio.gather(*(client(number) for number in range(clients)))
    return sum(counts) / (time.perf_counter() - start)


async def ask_reward(http: aiohttp.ClientSession, draw: random.Random) -> None:
    """The reward of one answer of twelve words."""
    body = {"prompt": TEXT, "completions": [" ".join(draw.choices(WORDS, k=12))]}
    async with http.post("/v1/rewards", json=body) as answer:
        answer.raise_for_status()
        await answer.read()


async def send_rating(http: aiohttp.ClientSession, draw: random.Random) -> None:
    """One rating of an answer that is brought along."""
    body = {"prompt": TEXT, "completions": [" ".join(draw.choices(WORDS, k=12))], "rating": draw.randint(1, 5)}
    async with http.post("/v1/feedback", json=body) as answer:
        assert answer.status == 201, await answer.text()
        await answer.read()


if __name__ == "__main__":
    raise SystemExit(main())
