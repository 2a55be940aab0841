import multiprocessing
import os
import signal
import time

import pytest
import torch
from expect import user_error
from failing_source import FailingSource

from localagg.config import ViewConfig
from localagg.data.loading.loader import Feed
from localagg.data.loading.workers import convert_worker_death, map_in_workers
from localagg.data.sources.open import open_images


def tensor(number):
    return torch.full((1000,), number)


def test_results_come_in_order_from_other_processes():
    results = list(map_in_workers(lambda number: (number, os.getpid()), range(30), 2))
    assert [number for number, _ in results] == list(range(30))
    processes = {process for _, process in results}
    assert len(processes) == 2
    assert os.getpid() not in processes


@pytest.mark.parametrize("position", [0, 25])
def test_a_killed_worker_is_a_user_error_and_no_hang(pictures, position):
    source = open_images(pictures)
    views = ViewConfig(image_size=24, eval_crop=1.0)
    feed = Feed(source, views, batch_size=10, memory="never", unreadable="skip", workers=2)
    feed.source = FailingSource(source, [int(feed.order(0)[position])], kill=True)
    with user_error("worker-died", "--workers"), convert_worker_death():
        for _ in feed.batches(0):
            time.sleep(0.05)  # it may die while no result is waited for


def test_a_worker_killed_before_its_results_are_fetched_is_a_user_error(monkeypatch):
    # Sockets of a killed process close a little before it counts as dead, and torch looks once.
    monkeypatch.setattr(multiprocessing.process.BaseProcess, "is_alive", lambda _: True)
    results = map_in_workers(tensor, range(20), 1)
    next(results)
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        time.sleep(1)  # until the next results are announced
        for worker in multiprocessing.active_children():
            worker.kill()
        with user_error("worker-died"):
            next(results)
    finally:
        signal.signal(signal.SIGCHLD, handler)


def test_other_errors_pass_through():
    results = map_in_workers(tensor, range(20), 1)
    next(results)
    with pytest.raises(ConnectionResetError):  # while all workers live
        results.throw(ConnectionResetError())  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(RuntimeError, match="of the network"), convert_worker_death():
        raise RuntimeError("of the network")
