"""A function whose printed lines reach the driver while it runs."""

import contextlib
import io
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rlhf_ray.roles.calls import Done, Line


def with_lines(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Line | Done]:
    """Runs a function in a thread and yields what it prints, line by line, then what it returns."""
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    outcome: list[Any] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with _Lines(lines) as out, contextlib.redirect_stdout(out):
                outcome.append(function(*args, **kwargs))
        except BaseException as error:
            failure.append(error)
        finally:
            lines.put(None)

    thread = threading.Thread(target=work, name=function.__name__, daemon=True)
    thread.start()
    while (text := lines.get()) is not None:
        yield Line(text)
    if failure:
        raise failure[0]
    yield Done(outcome[0])


class _Lines(io.TextIOBase):
    """A text stream that puts each whole line into a queue."""

    def __init__(self, lines: "queue.SimpleQueue[str | None]") -> None:
        self._lines, self._rest = lines, ""

    def write(self, text: str) -> int:
        *whole, self._rest = (self._rest + text).split("\n")
        for line in whole:
            self._lines.put(line)
        return len(text)

    def close(self) -> None:
        if self._rest:
            self._lines.put(self._rest)
            self._rest = ""
        super().close()
