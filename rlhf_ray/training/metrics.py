"""What a run writes down step by step: `metrics.jsonl`, TensorBoard, and one plain line for the job log.

`metrics.jsonl` is the record; TensorBoard is a view of it. A line is one JSON object with `step` first.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, SupportsFloat

from rlhf_ray.errors import DataError

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

FILE_NAME = "metrics.jsonl"

Metrics = Mapping[str, SupportsFloat | None]


class MetricsLog:
    """Writes one line a step to `folder/metrics.jsonl`, and the same figures to `folder/tensorboard`.

    A line is on disk when `write` returns. A line that a killed process left half-written is dropped on opening.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path = folder / FILE_NAME
        self._writer: SummaryWriter | None = None
        self._purge_step: int | None = None
        folder.mkdir(parents=True, exist_ok=True)
        if self._path.exists():
            _cut(self._path, _end_of_whole_lines(self._path.read_bytes()))

    def write(self, step: int, metrics: Metrics) -> None:
        """Append a step's figures; what is not finite becomes null, for JSON has no NaN."""
        figures = {name: _finite(value) for name, value in metrics.items() if name != "step"}
        line = json.dumps({"step": step, **figures}, allow_nan=False) + "\n"
        with self._path.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
        self._write_tensorboard(step, figures)

    def truncate_after(self, step: int) -> int:
        """Forget every step later than `step`, as a resumed run does; returns how many lines were dropped.

        TensorBoard's files stay; the next writer tells TensorBoard to hide what they hold beyond `step`.
        """
        self.close()
        self._purge_step = step + 1
        if not self._path.exists():
            return 0
        content = self._path.read_bytes()
        whole = content[: _end_of_whole_lines(content)]
        kept, dropped = 0, 0
        for line in whole.splitlines(keepends=True):
            if dropped or json.loads(line)["step"] > step:
                dropped += 1
            else:
                kept += len(line)
        _cut(self._path, kept)
        return dropped

    def close(self) -> None:
        """Close TensorBoard's file; `metrics.jsonl` is never held open."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_tensorboard(self, step: int, figures: Mapping[str, float | None]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # seconds to import, so only where something is written

            self._writer = SummaryWriter(str(self._folder / "tensorboard"), purge_step=self._purge_step)
        for name, value in figures.items():
            if value is not None:
                self._writer.add_scalar(name, value, step)
        self._writer.flush()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run folder's `metrics.jsonl`, oldest first; none where the file is missing.

    A torn last line is passed over. `DataError` names any other line that is not a JSON object with a step.
    """
    path = folder / FILE_NAME
    if not path.exists():
        return []
    content = path.read_bytes()
    rows = []
    for number, line in enumerate(content[: _end_of_whole_lines(content)].splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise DataError(f"{path}:{number} is not a JSON object with a step; delete the line to go on without it")
        rows.append(row)
    return rows


def progress_line(
    step: int,
    total: int,
    metrics: Metrics,
    eta: float | None = None,
    *,
    kl_limit: float | None = None,
    stage: str = "ppo",
) -> str:
    """A step in one plain line: no carriage return, no colour, so that a job log keeps it whole.

    `eta` is in seconds. Example:
    `ppo 12/60  gold 0.61  reward 0.42  kl 1.90/25  entropy 2.10  len 24  3.1 s/step  eta 2m31s`
    """
    limit = "" if kl_limit is None else f"/{kl_limit:g}"
    parts = [
        f"{stage} {step:>{len(str(total))}}/{total}",
        _part("gold", metrics.get("gold/mean"), ".2f"),
        _part("reward", metrics.get("objective/scores"), ".2f"),
        _part("kl", metrics.get("objective/kl"), ".2f", limit),
        _part("entropy", metrics.get("objective/entropy"), ".2f"),
        _part("len", metrics.get("rollout/length_mean"), ".0f"),
    ]
    if (seconds := metrics.get("time/step_s")) is not None:
        parts.append(f"{float(seconds):.1f} s/step")
    if eta is not None:
        parts.append(f"eta {duration(eta)}")
    return "  ".join(part for part in parts if part)


def duration(seconds: float) -> str:
    """Seconds as people say them: `48s`, `2m31s`, `1h05m`."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _part(name: str, value: SupportsFloat | None, form: str, tail: str = "") -> str:
    return "" if value is None else f"{name} {float(value):{form}}{tail}"


def _finite(value: SupportsFloat | None) -> float | None:
    if value is None or isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _end_of_whole_lines(content: bytes) -> int:
    return content.rfind(b"\n") + 1


def _cut(path: Path, size: int) -> None:
    if size == path.stat().st_size:
        return
    with path.open("r+b") as file:
        file.truncate(size)
        os.fsync(file.fileno())
