"""Stop a training loop on Ctrl-C or preemption: it ends its step, saves, and exits with a status.

Exit status: 130 after Ctrl-C; 75 (``EX_TEMPFAIL`` of sysexits.h: try again later) after SIGTERM or
SIGUSR1, by which schedulers announce preemption, and SIGHUP, by which a lost connection ends a
shell's jobs (not under nohup, which ignores it). Before the first step, or on a second signal, the
process ends at once with the shell's 143, 138 or 129. Runs can be resumed after each of them.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch.distributed as dist

from ..errors import Interrupted
from ..io.console import notify
from .collectives import CollectiveError

_STATUSES = {"SIGINT": 130, "SIGTERM": 75, "SIGUSR1": 75, "SIGHUP": 75}
# Windows has neither of the last two.
EXIT_STATUS = {getattr(signal, n): s for n, s in _STATUSES.items() if hasattr(signal, n)}


class StopRequest:
    """Whether a signal has requested the loop to stop, and the exit status that follows."""

    requested = False
    status = 0

    def error(self, message: str) -> Interrupted:
        """Return the exception that ends the loop after it has saved."""
        return Interrupted(message, status=self.status)


def _discard(descriptors: list[int]) -> None:
    """Let what is written to a lost terminal end in nothing: it would be an error."""
    with open(os.devnull, "w") as nothing:
        for number in descriptors:
            os.dup2(nothing.fileno(), number)


@contextmanager
def handle_stop_signals() -> Iterator[StopRequest]:
    """Turn the first of these signals into a stop request; a second one acts as before.

    A signal that already has a handler keeps it (submitit handles SIGTERM and SIGUSR2, for
    example). Outside of the main thread no signal is handled. After a failed collective SIGTERM is
    ignored: torchrun sends it to the ranks that are left, and the first of them has to name the
    rank that has died.
    """
    stop = StopRequest()
    defaults = (signal.SIG_DFL, signal.default_int_handler)
    previous = {n: signal.getsignal(n) for n in EXIT_STATUS if signal.getsignal(n) in defaults}

    terminals = [number for number in (1, 2) if os.isatty(number)]

    def request(number: int, _: FrameType | None) -> None:
        if number == getattr(signal, "SIGHUP", None):
            _discard(terminals)
        stop.requested = True
        stop.status = stop.status or EXIT_STATUS[signal.Signals(number)]
        signal.signal(number, previous[signal.Signals(number)])
        notify("Stopping after this step. A second signal stops at once and loses unsaved steps.")

    try:
        for number in previous:
            signal.signal(number, request)
    except ValueError:  # not in the main thread
        yield stop
        return
    try:
        yield stop
    except (CollectiveError, dist.DistError):
        previous[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
