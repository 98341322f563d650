"""What the feedback service acknowledged is there, once, however often its writer is killed."""

import asyncio
from pathlib import Path

import pytest

from benchmarks.feedback_chaos import torture


@pytest.mark.chaos
@pytest.mark.timeout(280)
def test_acknowledged_feedback_is_there_once_after_the_writer_was_killed_again_and_again(tmp_path: Path) -> None:
    outcome = asyncio.run(torture(tmp_path / "feedback.db", acknowledged=2_000, kills=4))
    assert (outcome.acknowledged, outcome.rows) == (2_000, 2_000)
    assert (outcome.lost, outcome.doubled) == (0, 0)
