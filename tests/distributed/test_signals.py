import os
import signal
import threading

import pytest

from localagg.distributed.signals import handle_stop_signals
from localagg.errors import Interrupted


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)]
)
def test_a_signal_asks_once_and_the_second_does_what_it_did_before(number, status):
    before = signal.getsignal(number)
    with handle_stop_signals() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert signal.getsignal(number) is before
        stopped = interrupt.error("so far")
        assert isinstance(stopped, Interrupted)
        assert stopped.status == status
        assert str(stopped) == "so far"
    assert signal.getsignal(number) is before


def test_a_signal_that_somebody_else_handles_stays_theirs():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    try:
        with handle_stop_signals() as interrupt:
            os.kill(os.getpid(), signal.SIGUSR1)
            assert heard == [1]
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_outside_of_the_main_thread_nothing_is_asked():
    found = []

    def run():
        with handle_stop_signals() as interrupt:
            found.append(interrupt.requested)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [False]
