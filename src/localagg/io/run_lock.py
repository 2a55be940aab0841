"""One process at a time writes a run folder."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the lock of a run folder, which is made where it is missing.

    The lock is the kernel's (``flock`` on ``RUN/.lock``), so it ends with the process that holds
    it, however that ends; the file stays and says who was last. Workers do not keep it: filelock
    closes it in forked processes. On network file systems ``flock`` must be passed on to the
    server, as NFS has done since Linux 2.6.12, and Lustre mounted with ``flock``; where it is
    not, two machines are not kept apart, though two processes of one machine are. On a file system
    without any ``flock`` filelock warns and makes a file that names its process instead; a dead
    one of another machine must then be removed by hand.

    Raises:
        UserError: another process holds it, or the file system has no locks.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK_NAME, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        holder = _holder(run)
        raise UserError(
            "TODO",
            f"Another process{holder} is writing '{run}'; wait until it has ended, or stop it.",
        ) from None
    except (NotImplementedError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            "TODO", f"'{run}' cannot be locked ({reason}); put it on a file system that has locks."
        ) from None
    try:
        if not isinstance(lock, SoftFileLock):
            with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
                (run / LOCK_NAME).write_text(f"{os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()


def _holder(run: Path) -> str:
    """`` (1234 on node7)``, where the file says so."""
    try:
        found = (run / LOCK_NAME).read_text()
    except OSError:
        return ""
    return f" ({found})" if found else ""
