"""A process that ends when the one that started it is gone, however that ended."""

import os
import signal
import threading
import time


def end_with_parent(*, every_s: float = 1.0) -> None:
    """Watches the parent from a thread: a killed one cannot tell its children."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(every_s)
        os.kill(os.getpid(), signal.SIGKILL)  # nobody is left to answer to

    threading.Thread(target=watch, name="end-with-parent", daemon=True).start()
