"""Checkpoints written while the next step goes on: a step waits for the copy of what is saved, not for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from rlhf_ray.errors import InfrastructureError


class BackgroundWriter:
    """One write at a time, in a thread of its own; no failure of it stays there."""

    def __init__(self, *, deadline_s: float) -> None:
        self.deadline_s = deadline_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[object] | None = None

    def begin(self, write: Callable[[], object]) -> str | None:
        """Returns at once, or once the write before is done; then why the disk refused that one, if it did."""
        refused = self.finish()
        self._writing = self._thread.submit(write)
        return refused

    def finish(self) -> str | None:
        """Waits for what was begun; why the disk refused it, said once. Whatever else went wrong is raised."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        try:
            writing.result(timeout=self.deadline_s)
        except TimeoutError:
            raise InfrastructureError(
                f"a checkpoint was not written within {self.deadline_s:g} s: is the disk of run.root stuck? Raise "
                "resources.call_deadline_s where it is only slow"
            ) from None
        except OSError as error:
            return str(error)
        return None
