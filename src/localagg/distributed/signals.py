"""Ctrl-C and preemption: a loop stops after its step, saves, and its process says so when it ends.

Exit status: 130 after Ctrl-C; 75 (``EX_TEMPFAIL`` of sysexits.h: try again later) after SIGTERM or
SIGUSR1, with which schedulers announce that they will take the machine away. A process that such a
signal ends before its first step, or a second one at once, has the shell's 143 or 138. Runs go on
after each of them.
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..errors import Interrupted
from ..io.console import notify

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGUSR1: 75}
_OWN = (signal.SIG_DFL, signal.default_int_handler)


class StopRequest:
    """Whether the loop has been asked to stop."""

    requested = False
    status = 0
    """The exit status, once asked."""

    def error(self, message: str) -> Interrupted:
        """The exception that ends the loop once it has saved."""
        return Interrupted(message, status=self.status)


@contextmanager
def handle_stop_signals() -> Iterator[StopRequest]:
    """SIGINT, SIGTERM and SIGUSR1 ask the loop to stop after its step; a second one of the same
    kind does what it did before.

    A signal that somebody else handles already (submitit takes SIGTERM and SIGUSR2, for example) is
    left to them. Outside of the main thread no signal can be handled, so nothing is ever asked.
    """
    interrupt = StopRequest()
    before = {number: signal.getsignal(number) for number in STATUS}

    def ask(number: int, _: FrameType | None) -> None:
        interrupt.requested = True
        interrupt.status = interrupt.status or STATUS[signal.Signals(number)]
        signal.signal(number, before[signal.Signals(number)])
        notify("Stopping after this step (once more: at once, losing what is not saved).")

    taken = [number for number in STATUS if before[number] in _OWN]
    try:
        for number in taken:
            signal.signal(number, ask)
    except ValueError:  # not the main thread
        yield interrupt
        return
    try:
        yield interrupt
    finally:
        for number in taken:
            signal.signal(number, before[number])
