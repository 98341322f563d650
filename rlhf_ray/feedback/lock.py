"""The lock that lets one process write a SQLite file: `flock` on `<database>.lock`, held while a store is open.

The kernel gives it back when the process ends, however it ends. It needs a local disk.
"""

import fcntl
import os
import socket
from pathlib import Path

from rlhf_ray.errors import DataError, InfrastructureError


class WriterLock:
    """The right to write to one store, for as long as this object is not released."""

    def __init__(self, database: Path) -> None:
        path = database.with_name(database.name + ".lock")
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise DataError(f"cannot write beside {database} ({error.strerror}): name another place") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(self._file, 200).decode(errors="replace").strip() or "another process"
            os.close(self._file)
            raise InfrastructureError(
                f"feedback store {database} is being written by {holder}: wait for it, or open the store read_only"
            ) from None
        os.ftruncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Let another process write. The file stays: removing it would let two hold the lock."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
