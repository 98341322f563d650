"""SIGINT and SIGTERM: a loop that can save itself finishes its step first, everything else stops at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rlhf_ray.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Whether the run was asked to stop, and by which signal."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._graceful = False

    @contextmanager
    def listening(self) -> Iterator["Stopping"]:
        """Takes over both signals; the former handlers come back afterwards."""
        before = {number: signal.getsignal(number) for number in SIGNALS}
        self.listen_again()
        try:
            yield self
        except SystemError as error:  # what Ray's compiled code makes of our exception where a signal meets it waiting
            if isinstance(error.__cause__, Interrupted):
                raise error.__cause__ from None
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def listen_again(self) -> None:
        """Takes the signals back from a library that has taken them.

        Starting Ray installs a handler of its own for SIGTERM, which aborts the process after three seconds: too soon
        for a step to be finished and saved.
        """
        for number in SIGNALS:
            signal.signal(number, self._handle)

    @contextmanager
    def graceful(self) -> Iterator[None]:
        """In here a first signal is only noted; a second one stops at once."""
        self._graceful = True
        try:
            yield
        finally:
            self._graceful = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        again, self.asked = self.asked is not None, signal.Signals(number)
        if again or not self._graceful:
            raise Interrupted(f"stopped on {self.asked.name}; the same command resumes", 128 + number)
