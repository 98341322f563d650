"""What does the service cost? Tokens a second through Ray Serve and its door, against bare `vllm serve`.

    python benchmarks/serving.py                      # a random Llama of about 100M parameters, 8 clients
    python benchmarks/serving.py --hidden 128 --layers 4 --rounds 1    # a quick look

Both hold the same weights with the same engine settings (float32, eager, prompts read whole), both are up the whole
time, and the same prompts go to one and then to the other, round after round: the median of the rounds counts.
The ratio has to be at least 0.85 without streaming. Answers through the service are kept, as they are by default.
"""

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_ray.models.policy import save_policy, train_tokenizer
from rlhf_ray.models.registry import Registry
from rlhf_ray.serving.settings import PolicySettings, ServiceConfig

WANTED = 0.85
CONTEXT = 512
KV_CACHE_MIB = 512
VOCABULARY = 16_384
TEXT = "my lamp chair arrived broken never today please send a new one and tell me when it comes"
WORDS = TEXT.split()


def main() -> int:
    """Prints each round and the ratio; exits 1 where it is below what is wanted."""
    options = _options()
    threads = str(options.threads)
    os.environ |= {"OMP_NUM_THREADS": threads, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1"}
    os.environ |= {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended
    with tempfile.TemporaryDirectory() as root:
        folder = make_model(Path(root) / "policy", hidden=options.hidden, layers=options.layers)
        with bare(folder) as bare_url, served(folder, Path(root), options.threads) as served_url:
            rates = asyncio.run(measure({"vllm serve": bare_url, "rlhf-ray": served_url}, options))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    for name, found in rates.items():
        print(f"{name:<12}{medians[name]:>9.1f} tokens/s, {min(found):.1f} to {max(found):.1f} in {len(found)} rounds")
    ratio = medians["rlhf-ray"] / medians["vllm serve"]
    print(f"ratio {ratio:.3f} (wanted: {WANTED} without streaming)")
    return 0 if ratio >= WANTED or options.stream else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput of the policy through Ray Serve against bare vllm serve.")
    parser.add_argument("--hidden", type=int, default=768, help="768 and 12 layers: about 100M parameters")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=4, help="of each client in a round")
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2, help="of each engine; they work in turns")
    parser.add_argument("--stream", action="store_true")
    return parser.parse_args()


def make_model(folder: Path, *, hidden: int, layers: int) -> Path:
    """A random Llama with a tokenizer and a chat template."""
    tokenizer = train_tokenizer([TEXT], vocabulary=512, context=CONTEXT)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters")
    save_policy(folder, model, tokenizer)
    return folder


@contextmanager
def bare(folder: Path) -> Iterator[str]:
    """vLLM's own server, with the settings of our engine."""
    port = free_port()
    arguments = [
        "--model", str(folder), "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy",
        "--dtype", "float32", "--enforce-eager", "--max-model-len", str(CONTEXT), "--max-num-seqs", "256",
        "--max-num-batched-tokens", "8192", "--no-enable-chunked-prefill", "--enable-prefix-caching",
        "--kv-cache-memory-bytes", str(KV_CACHE_MIB << 20), "--generation-config", "vllm",
        "--distributed-executor-backend", "uni", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    # what `vllm serve` runs; the command itself does not start in a CPU build, whose package has another name
    server = [sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry"]
    process = subprocess.Popen([*server, *arguments], stdout=subprocess.DEVNULL)
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


@contextmanager
def served(folder: Path, root: Path, threads: int) -> Iterator[str]:
    """The service, with one replica and answers kept."""
    import ray
    from ray import serve

    from rlhf_ray.serving.app import application

    registry = Registry(root / "registry")
    registry.promote("policy", registry.publish("policy", folder, lineage={}).number, by="benchmark")
    config = ServiceConfig(
        registry=registry.root,
        store=str(root / "feedback.db"),
        keys=str(root / "keys.db"),
        port=free_port(),
        parts=frozenset({"policy", "feedback"}),
        policy=PolicySettings(kv_cache_mib=KV_CACHE_MIB, threads=threads),
    )
    ray.init(num_cpus=threads + 4, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": config.host, "port": config.port})
        serve.run(application(config), name="benchmark")
        yield f"http://{config.host}:{config.port}"
    finally:
        serve.shutdown()
        ray.shutdown()


async def measure(urls: dict[str, str], options: argparse.Namespace) -> dict[str, list[float]]:
    """Tokens a second of each, round by round; who goes first changes every round."""
    rates: dict[str, list[float]] = {name: [] for name in urls}
    for turn in range(-1, options.rounds):  # the first one only warms up
        order = list(urls.items())[:: 1 if turn % 2 else -1]
        for name, url in order:
            rate = await one_round(url, seed=turn, options=options)
            if turn >= 0:
                rates[name].append(rate)
                print(f"round {turn}: {name:<12}{rate:>9.1f} tokens/s", flush=True)
    return rates


async def one_round(url: str, *, seed: int, options: argparse.Namespace) -> float:
    """All clients at once, each with its requests one after another."""
    draw = random.Random(seed)
    prompts = [[" ".join(draw.choices(WORDS, k=16)) for _ in range(options.requests)] for _ in range(options.clients)]
    async with httpx.AsyncClient(base_url=url, timeout=300) as http:
        start = time.perf_counter()
        counts = await asyncio.gather(*(one_client(http, own, options) for own in prompts))
        return sum(counts) / (time.perf_counter() - start)


async def one_client(http: httpx.AsyncClient, prompts: list[str], options: argparse.Namespace) -> int:
    """How many tokens it was given."""
    tokens = 0
    for prompt in prompts:
        body: dict[str, Any] = {
            "model": "policy",
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": options.tokens,
            "temperature": 0,
        }
        if options.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
            async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                events = [line async for line in answer.aiter_lines() if line.startswith("data: {")]
            tokens += json.loads(events[-1].removeprefix("data: "))["usage"]["completion_tokens"]
        else:
            answer = await http.post("/v1/chat/completions", json=body)
            answer.raise_for_status()
            tokens += answer.json()["usage"]["completion_tokens"]
    return tokens


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: "subprocess.Popen[bytes]", within_s: float = 300) -> None:
    """Returns once it answers 200; raises where the process has ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            if httpx.get(url, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise TimeoutError(f"{url} did not answer within {within_s:g} s")


if __name__ == "__main__":
    raise SystemExit(main())
