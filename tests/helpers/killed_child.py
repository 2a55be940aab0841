"""A function in a process of its own that SIGKILL ends in a given call: no clock decides where."""

import os
import signal
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

FORK = get_context("fork")  # modules stay imported: otherwise most calls of a child are imports


def run_in_child(
    function: Callable[..., Any], *arguments: Any, killed_in: int | None = None
) -> tuple[int, int]:
    """Return (exit code, calls and returns of the main thread); be killed in ``killed_in``."""
    calls = FORK.Value("q", 0)
    process = FORK.Process(target=_count_calls, args=(function, arguments, killed_in, calls))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, calls.value


def _count_calls(function, arguments, killed_in, calls) -> None:
    count, main = 0, os.getpid()

    def profile(frame, event, argument):
        nonlocal count
        count += 1
        if count == killed_in and os.getpid() == main:  # workers inherit this function
            os.kill(main, signal.SIGKILL)

    sys.setprofile(profile)
    function(*arguments)
    sys.setprofile(None)
    calls.value = count
