import os
import signal
import threading

import pytest
import torch.distributed as dist

from localagg.distributed.collectives import CollectiveError
from localagg.distributed.signals import handle_stop_signals
from localagg.errors import Interrupted


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_the_first_signal_requests_a_stop_and_the_second_acts_as_before(number, status):
    before = signal.getsignal(number)
    with handle_stop_signals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        assert signal.getsignal(number) is before
        error = stop.error("so far")
        assert isinstance(error, Interrupted)
        assert (error.status, str(error)) == (status, "so far")
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("error", [CollectiveError, dist.DistNetworkError])
def test_after_a_failed_collective_sigterm_is_ignored(error):
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(error), handle_stop_signals():
            raise error("connection closed by peer")
        os.kill(os.getpid(), signal.SIGTERM)  # it would end this process
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_with_a_handler_keeps_it():
    received = []
    before = signal.signal(signal.SIGUSR1, lambda *_: received.append(1))
    try:
        with handle_stop_signals() as stop:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert received == [1]
            assert not stop.requested
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_of_the_main_thread_no_signal_is_handled():
    found = []

    def run():
        with handle_stop_signals() as stop:
            found.append(stop.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
