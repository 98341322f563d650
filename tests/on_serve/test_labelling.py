"""People label through the service itself, while the writer of the store is killed under them."""

import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from rlhf_ray.client import Client, TaskTaken
from rlhf_ray.feedback.quality import quality_of
from rlhf_ray.feedback.store import FeedbackStore
from tests.feedback.places import KINDS, place
from tests.serving.test_serve import rlhf, serving

pytestmark = [pytest.mark.serve, pytest.mark.timeout(600)]

ITEMS, ROUNDS, RATERS, RATINGS = 50, 3, 4, 150
SAMPLERS = ("base-policy-name", "ppo-policy-name")


def kill_the_writer(service: int) -> None:
    """-9, as a power cut would."""
    for process in psutil.Process(service).children(recursive=True):
        if "RecordsDeployment" in " ".join(process.cmdline()):
            process.kill()
            return
    raise AssertionError("there is no writer")


def label(url: str, key: str, met: list[str], *, contrary_every: int) -> None:
    """Prefers A, but for some items."""
    with Client(url, key, deadline_s=120) as client:
        while task := client.next_task():
            assert not any(name in str(task) for name in SAMPLERS)
            best = "B" if (int(task.id[1:]) + 1) % contrary_every == 0 else "A"
            try:
                client.answer_task(task.id, ranking=[1 if text[0] == best else 2 for text in task.answers])
                met.append(task.id)
            except TaskTaken:
                assert False, "a task of one's own was given away"  # noqa: B011, PT015


def rate(url: str, key: str, name: str, acknowledged: dict[str, str]) -> None:
    with Client(url, key, deadline_s=120) as client:
        for number in range(RATINGS):
            text = f"{name}-{number}"
            acknowledged[text] = client.send(prompt=text, completions=["x"], rating=3, idempotency_key=text).id
            time.sleep(0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost_or_doubled_and_everybody_stays_blind_while_the_writer_dies(tmp_path: Path, kind: str) -> None:
    with place(kind, tmp_path) as store:
        label_through_deaths(tmp_path, store)


def label_through_deaths(tmp_path: Path, database: str) -> None:
    keys = {
        name: rlhf("keys", "create", name, "--role", role, cwd=tmp_path).strip()
        for name, role in (("boss", "admin"), ("ann", "annotator"), ("bea", "annotator"))
    }
    met: dict[str, list[str]] = {"ann": [], "bea": []}
    acknowledged: list[dict[str, str]] = [{} for _ in range(RATERS)]
    with (
        serving(tmp_path, "parts=[feedback]", f"store={database}") as (process, url),
        Client(url, keys["boss"], deadline_s=120) as boss,
    ):
        answers = [
            [{"text": f"{letter}{n}", "sampler": name} for letter, name in zip("AB", SAMPLERS, strict=True)]
            for n in range(ITEMS)
        ]
        tasks = [
            {"id": f"t{n}", "prompt": f"Q{n}", "completions": texts, "overlap": 2} for n, texts in enumerate(answers)
        ]
        assert boss.add_tasks(tasks).new == ITEMS
        people = [
            threading.Thread(target=label, args=(url, keys[name], met[name]), kwargs={"contrary_every": every})
            for name, every in (("ann", 1_000_000), ("bea", 5))
        ]
        people += [
            threading.Thread(target=rate, args=(url, keys["boss"], f"r{n}", acknowledged[n])) for n in range(RATERS)
        ]
        for thread in people:
            thread.start()
        for _ in range(ROUNDS):
            time.sleep(2)
            kill_the_writer(process.pid)
            assert boss.progress().tasks == ITEMS  # the writer is back
        for thread in people:
            thread.join(300)
        assert boss.freeze("all").rows == 2 * ITEMS + RATERS * RATINGS
    with FeedbackStore(database, read_only=True) as store:
        rows = list(store.iter())
    assert sorted(met["ann"]) == sorted(met["bea"]) == sorted(f"t{n}" for n in range(ITEMS))
    there = {item.id for item in rows}
    told = {text: id_ for some in acknowledged for text, id_ in some.items()}
    assert len(told) == RATERS * RATINGS
    assert there >= set(told.values())
    counted = Counter((item.prompt_id, item.annotator) for item in rows)
    assert set(counted.values()) == {1}
    rankings = [item for item in rows if item.kind == "ranking"]
    assert all(item.display_order is not None and item.seconds is not None for item in rankings)
    (choices,) = [found for found in quality_of(rows).agreement if "better" in found.what]
    assert choices.things == ITEMS
    # ann: A always; bea: B in 10 of 50. Which of two texts counts as the first is by their digests.
    flips = [item.preferences[0][0].text[0] for item in rankings if item.annotator == "bea"]
    assert Counter(flips) == {"A": 40, "B": 10}
