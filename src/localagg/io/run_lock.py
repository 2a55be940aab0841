"""Lock a run folder, so that one process at a time writes it."""

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

LOCK_NAME = ".lock"


@contextlib.contextmanager
def lock_run(run: Path, name: str = LOCK_NAME, timeout: float = 0) -> Iterator[None]:
    """Hold the lock of a run folder, which is created if it is missing.

    The lock is the kernel's (``flock`` on ``RUN/.lock``), so it ends with its process, however that
    ends; the file stays and names the last holder. filelock closes it in forked processes, so
    workers do not keep it. NFS (since Linux 2.6.12) and Lustre mounted with ``flock`` pass the lock
    on to the server; other network file systems separate only the processes of one machine. Without
    any ``flock`` filelock warns and creates a file that names its process; remove the file of a
    dead process on another machine by hand.

    Args:
        run: the folder.
        name: of the lock's file.
        timeout: seconds to wait for another process.

    Raises:
        UserError: another process holds the lock, or the file system has no locks.
    """
    from filelock import FileLock, SoftFileLock, Timeout

    run.mkdir(parents=True, exist_ok=True)
    lock, file = FileLock(run / name, timeout=timeout), run / name
    try:
        lock.acquire()
    except Timeout:
        try:
            holder = file.read_text()  # "PID on HOST"
        except OSError:
            holder = ""
        process = f"Another process ({holder})" if holder else "Another process"
        raise UserError(
            "busy", f"{process} is writing '{run}'; wait until it has ended, or stop it."
        ) from None
    except (NotImplementedError, OSError) as error:
        reason, advice = getattr(error, "strerror", None) or error, "use a file system with locks"
        if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "its folder must be writable: change its permissions, or copy it"
        raise UserError("environment", f"Cannot lock '{run}' ({reason}); {advice}.") from None
    try:
        if not isinstance(lock, SoftFileLock):
            with contextlib.suppress(OSError):  # a full disk does not affect the lock
                file.write_text(f"{os.getpid()} on {socket.gethostname()}")
        yield
    finally:
        lock.release()
