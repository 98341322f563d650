"""What `rlhf feedback export` writes, TRL's own trainers take: its released package, in an environment of its own."""

import os
import subprocess
from pathlib import Path

import pytest

from rlhf_ray.feedback.schema import Answer, Feedback, Ranking, Rating
from rlhf_ray.feedback.transfer import export_feedback
from rlhf_ray.types import Message
from tests.models.tiny import make_policy_folder

PYTHON = Path(__file__).parents[2] / "build/peers/trl-1.16.0/bin/python"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.exists(), reason="no TRL beside this: `python benchmarks/peers.py` installs it"),
    pytest.mark.timeout(300),
]


def judged() -> list[Feedback]:
    """Rankings for pairs, thumbs for the unpaired, with what JSON and Parquet could spoil."""
    items = []
    for n in range(8):
        messages = (Message("user", f'my "lamp" arrived broken \U0001f4a1\n{n}'),)
        answers = (Answer(text=f"we send a new one today {n}", sampler="a"), Answer(text=f"sorry, no {n}", sampler="b"))
        shared = {"messages": messages, "prompt_id": f"p{n}", "group": f"p{n}", "annotator": "ann"}
        items.append(Feedback(**shared, answers=answers, ranking=Ranking(ranks=(1, 2))))
        for value, answer in zip((1, 0), answers, strict=True):
            items.append(Feedback(**shared, answers=(answer,), rating=Rating(value=value, scale="thumb")))
    return items


@pytest.mark.parametrize("conversational", [False, True], ids=["text", "conversational"])
@pytest.mark.parametrize(
    ("format", "trainer", "ending"),
    [
        ("preference", "reward", "jsonl"),
        ("preference", "dpo", "parquet"),
        ("implicit", "reward", "parquet"),
        ("implicit", "dpo", "jsonl"),
        ("unpaired", "kto", "jsonl"),
        ("unpaired", "kto", "parquet"),
        ("prompt-completion", "sft", "jsonl.gz"),
    ],
)
def test_trl_trains_from_what_is_exported(
    tmp_path: Path, format: str, trainer: str, ending: str, conversational: bool
) -> None:
    file = tmp_path / f"rows.{ending}"
    written = export_feedback(file, judged(), format, conversational=conversational)
    assert written.rows >= 8
    model = make_policy_folder(tmp_path / "model")
    command = [PYTHON, Path(__file__).with_name("trl_trains.py"), model, trainer, file, tmp_path / "out"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{trainer}: {written.rows} rows of " in done.stdout, done.stdout
