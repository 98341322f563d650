"""Is feedback that was acknowledged there, once, after the writer was killed again and again? And how fast is it?

    python benchmarks/feedback_chaos.py [--acknowledged 20000] [--kills 20]

The writer is the feedback part of the door under uvicorn, in a process of its own. Many clients send ratings, each
under a key of its own, and send again what was not acknowledged, while the writer is killed (-9) at random moments and
started anew. Afterwards the store is read: an acknowledged id that is not in it is lost, a request with two rows is
doubled. Before that, nobody being killed: acknowledgements a second at the store and over HTTP, and rows a second in
batches, beside bare sqlite3 that writes the same text to the same disk in the same turn.
"""

import argparse
import asyncio
import os
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
from fastapi import FastAPI

from rlhf_ray.feedback.requests import RequestKey, Submission
from rlhf_ray.feedback.schema import Answer, Feedback, Rating, to_json
from rlhf_ray.feedback.store import FeedbackStore
from rlhf_ray.serving.door import create_door
from rlhf_ray.serving.errors import ApiError
from rlhf_ray.serving.records import Records
from rlhf_ray.serving.settings import LimitSettings, ServiceConfig
from rlhf_ray.types import Message

ROOT = Path(__file__).parent.parent
CLIENTS = 64
START_WITHIN_S = 180
TRY_FOR_S = 600


class NoKeys:
    """Nobody has made a key: whoever is on this machine may do everything."""

    def any(self) -> bool:
        return False

    def caller(self, key: str) -> None:
        return None


def app() -> FastAPI:
    """What uvicorn serves in the writer's process."""
    config = ServiceConfig(limits=LimitSettings(requests_per_minute=10_000_000, concurrent=1_000))
    records = Records(os.environ["FEEDBACK_STORE"])
    return create_door(config, policy=None, reward=None, records=records, versions=None, keys=NoKeys())


@dataclass
class Outcome:
    """What became of the acknowledged."""

    acknowledged: int
    rows: int
    lost: int
    doubled: int
    kills: int
    replayed: int
    """Requests that had been written when the writer died before saying so."""
    seconds: float
    back_s: list[float] = field(default_factory=list)
    """From each kill to an answering writer."""


class Writer:
    """The process that serves the feedback routes."""

    def __init__(self, store: Path) -> None:
        self._store = store
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._process = self._launch()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def _launch(self) -> subprocess.Popen[bytes]:
        module = f"{Path(__file__).parent.name}.{Path(__file__).stem}:app"
        command = [sys.executable, "-m", "uvicorn", module, "--factory", "--port", str(self.port)]
        environment = {**os.environ, "FEEDBACK_STORE": str(self._store), "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([*command, "--log-level", "warning", "--no-access-log"], cwd=ROOT, env=environment)

    def kill(self) -> None:
        """As a power cut does it, as far as the process is concerned."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=30)

    def restart(self) -> None:
        self._process = self._launch()

    async def answers(self) -> None:
        """Returns once it does."""
        end = time.monotonic() + START_WITHIN_S
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(2)) as http:
            while time.monotonic() < end:
                try:
                    async with http.get(f"{self.url}/healthz") as answer:
                        if answer.ok:
                            return
                except (aiohttp.ClientError, TimeoutError):
                    await asyncio.sleep(0.05)
        raise TimeoutError(f"the writer did not answer within {START_WITHIN_S} s")


class Crowd:
    """Clients that send ratings, each until it is acknowledged. httpx would take ten times the server's time."""

    def __init__(self, url: str, wanted: int) -> None:
        self._url = f"{url}/v1/feedback"
        self._numbers = iter(range(wanted))
        self.ids: dict[int, str] = {}
        self.replayed = 0

    async def run(self) -> None:
        connections = aiohttp.TCPConnector(limit=CLIENTS)
        wait = aiohttp.ClientTimeout(10)
        async with aiohttp.ClientSession(connector=connections, timeout=wait) as http, asyncio.TaskGroup() as group:
            for _ in range(CLIENTS):
                group.create_task(self._client(http))

    async def _client(self, http: aiohttp.ClientSession) -> None:
        for number in self._numbers:
            end = time.monotonic() + TRY_FOR_S
            while number not in self.ids:
                assert time.monotonic() < end, f"request {number} was not acknowledged within {TRY_FOR_S} s"
                try:
                    await self._send(http, number)
                except (aiohttp.ClientError, TimeoutError):
                    await asyncio.sleep(random.uniform(0.05, 0.2))

    async def _send(self, http: aiohttp.ClientSession, number: int) -> None:
        body = {"prompt": f"question {number}", "completions": ["An answer."], "rating": 1 + number % 5}
        async with http.post(self._url, json=body, headers={"Idempotency-Key": f"key-{number}"}) as answer:
            if answer.status == 201:
                self.ids[number] = (await answer.json())["id"]
                self.replayed += "Idempotency-Replayed" in answer.headers
                return
            assert answer.status in (409, 503), await answer.text()
        await asyncio.sleep(random.uniform(0.05, 0.2))


async def torture(store: Path, *, acknowledged: int, kills: int, seed: int = 0) -> Outcome:
    """So many acknowledgements, the writer being killed so many times meanwhile, and what is left of them."""
    draw = random.Random(seed)
    moments = sorted(draw.randrange(acknowledged) for _ in range(kills))
    writer = Writer(store)
    back: list[float] = []
    try:
        await writer.answers()
        started = time.monotonic()
        crowd = Crowd(writer.url, acknowledged)
        sending = asyncio.create_task(crowd.run())
        for moment in moments:
            while len(crowd.ids) < moment and not sending.done():
                await asyncio.sleep(0.002)
            await asyncio.sleep(draw.uniform(0, 0.05))
            killed = time.monotonic()
            writer.kill()
            writer.restart()
            await writer.answers()
            back.append(time.monotonic() - killed)
        await sending
        seconds = time.monotonic() - started
    finally:
        writer.kill()
    return judge(store, crowd, kills=kills, seconds=seconds, back_s=back)


def judge(store: Path, crowd: Crowd, *, kills: int, seconds: float, back_s: list[float]) -> Outcome:
    """Holds what was acknowledged against what is in the file."""
    with FeedbackStore(store, read_only=True) as opened:
        rows = list(opened.iter())
    there = Counter(row.id for row in rows)
    by_request = Counter(row.messages[0].content for row in rows)
    return Outcome(
        acknowledged=len(crowd.ids),
        rows=len(rows),
        lost=sum(there[id_] != 1 for id_ in crowd.ids.values()),
        doubled=sum(count - 1 for count in by_request.values()),
        kills=kills,
        replayed=crowd.replayed,
        seconds=seconds,
        back_s=back_s,
    )


def submission(number: int) -> Submission:
    item = Feedback(
        messages=(Message("user", f"question {number}"),),
        prompt_id=str(number),
        group=str(number),
        answers=(Answer(text="An answer.", sampler="policy"),),
        rating=Rating(value=4),
        annotator="ann-1",
    )
    return Submission((item,), item.id, RequestKey("key-1", f"k{number}", "0" * 64))


def alone(store: Path, count: int) -> float:
    """Acknowledgements a second, one commit each."""
    with FeedbackStore(store) as opened:
        started = time.perf_counter()
        for number in range(count):
            opened.commit([submission(number)])
        return count / (time.perf_counter() - started)


def bare(path: Path, texts: list[str], *, at_once: int) -> float:
    """Rows a second of sqlite3 itself, durable like the store's."""
    connection = sqlite3.connect(path, isolation_level=None)
    for pragma in ("journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}")
    connection.execute("CREATE TABLE feedback (seq INTEGER PRIMARY KEY, id TEXT UNIQUE, body TEXT)")
    started = time.perf_counter()
    for start in range(0, len(texts), at_once):
        connection.execute("BEGIN IMMEDIATE")
        some = [(f"id-{start + number}", text) for number, text in enumerate(texts[start : start + at_once])]
        connection.executemany("INSERT INTO feedback (id, body) VALUES (?, ?)", some)
        connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return len(texts) / seconds


def in_batches(store: Path, items: list[Feedback], *, at_once: int) -> float:
    """Rows a second, a thousand or so a commit."""
    with FeedbackStore(store) as opened:
        started = time.perf_counter()
        for start in range(0, len(items), at_once):
            opened.add(items[start : start + at_once])
        return len(items) / (time.perf_counter() - started)


def speeds(folder: Path, *, rounds: int = 3) -> None:
    """One by one and in batches, in turns with bare sqlite3; medians."""
    items = [submission(number).items[0] for number in range(20_000)]
    texts = [to_json(item) for item in items]
    found: dict[str, list[float]] = {}
    for turn in range(rounds):
        measured = {
            "one by one": alone(folder / f"alone-{turn}.db", 500),
            "bare, one by one": bare(folder / f"bare-alone-{turn}.db", texts[:500], at_once=1),
            "in batches": in_batches(folder / f"batches-{turn}.db", items, at_once=1_000),
            "bare, in batches": bare(folder / f"bare-batches-{turn}.db", texts, at_once=1_000),
        }
        for name, rate in measured.items():
            found.setdefault(name, []).append(rate)
    rates = {name: statistics.median(values) for name, values in found.items()}
    for name, wanted in (("one by one", 300), ("in batches", 10_000)):
        rate, beside = rates[name], rates[f"bare, {name}"]
        print(
            f"store, {name}: {rate:8.0f} rows/s (wanted: {wanted}), {rate / beside:.2f} of bare sqlite3 ({beside:.0f})"
        )


async def together(store: Path, count: int) -> float:
    """Acknowledgements a second where many wait for one commit."""
    records = Records(store)
    numbers = iter(range(count))

    async def client() -> None:
        for number in numbers:
            receipt = await records.add_feedback(submission(number))
            assert not receipt.replayed

    started = time.perf_counter()
    try:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))
    except ApiError as error:
        raise AssertionError(error.message) from error
    seconds = time.perf_counter() - started
    await records.close()
    return count / seconds


def main() -> int:
    """Prints the figures; exits 1 where something was lost or doubled."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--acknowledged", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the stores are put; a real disk, not memory")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        speeds(folder)
        rate = asyncio.run(together(folder / "together.db", 5_000))
        print(f"store, {CLIENTS} callers:       {rate:8.0f} durable acknowledgements/s (to reach: 300)")
        calm = asyncio.run(torture(folder / "calm.db", acknowledged=2_000, kills=0))
        print(f"HTTP, {CLIENTS} clients:        {calm.acknowledged / calm.seconds:8.0f} durable acknowledgements/s")
        hard = asyncio.run(
            torture(folder / "hard.db", acknowledged=asked.acknowledged, kills=asked.kills, seed=asked.seed)
        )
    print(
        f"under {hard.kills} kill -9: {hard.acknowledged} acknowledged, {hard.lost} lost, {hard.doubled} doubled, "
        f"{hard.replayed} written but not said in time, in {hard.seconds:.0f} s"
    )
    if hard.back_s:
        print(f"back after a kill: median {statistics.median(hard.back_s):.1f} s, longest {max(hard.back_s):.1f} s")
    return int(bool(hard.lost or hard.doubled or hard.rows != hard.acknowledged))


if __name__ == "__main__":
    sys.exit(main())
