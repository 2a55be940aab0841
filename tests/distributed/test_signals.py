import os
import signal
import threading

import pytest

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
