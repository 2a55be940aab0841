import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from expect import user_error
from failing_source import FailingSource

from localagg.config import ViewConfig
from localagg.data.loading.loader import Feed
from localagg.data.loading.workers import convert_worker_death, map_in_workers
from localagg.data.sources.open import open_images
from localagg.errors import UserError


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


def large(number):
    return torch.full((2_000_000,), number, dtype=torch.uint8), {number: "its name"}


SMALL_SHARED_MEMORY = """
import sys
sys.path[:0] = {path}
from localagg.data.loading.workers import map_in_workers
import test_workers
for number, (values, names) in enumerate(map_in_workers(test_workers.large, range(30), 2)):
    assert (values == number).all() and names == {{number: "its name"}}
print("all")
"""


def test_batches_larger_than_shared_memory_arrive(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SMALL_SHARED_MEMORY.format(path=[os.path.dirname(__file__), *sys.path]))
    mount = "mount -t tmpfs -o size=5m tmpfs /dev/shm"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm needs root")
    command = f"{mount} && exec {sys.executable} {script}"
    done = subprocess.run(["unshare", "-m", "sh", "-c", command], capture_output=True, timeout=60)
    assert done.stdout == b"all\n", done.stderr


WITHOUT_ROOM = """
import sys
sys.path[:0] = {path}
from localagg.data.loading.workers import map_in_workers
from localagg.errors import UserError
try:
    list(map_in_workers(len, ["one", "two"], 2))
except UserError as error:
    print(error.code, error)
"""


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("mount -t tmpfs -o size=4k tmpfs /dev/shm", "No space left"),
        ("ulimit -n 64", "Too many open files"),
    ],
)
def test_a_system_that_starts_no_workers_is_told_without_a_traceback(limit, reason, tmp_path):
    script = tmp_path / "script.py"
    setup = "import os\nkept = [os.open(os.devnull, 0) for _ in range(50)]\n" * ("-n" in limit)
    script.write_text(WITHOUT_ROOM.format(path=sys.path).replace("try:", f"{setup}try:", 1))
    start = ["unshare", "-m", "sh", "-c"]
    if subprocess.run([*start, limit], capture_output=True).returncode:
        pytest.skip("mounting a small /dev/shm needs root")
    command = f"{limit} && exec {sys.executable} {script}"
    done = subprocess.run([*start, command], capture_output=True, timeout=60, text=True)
    assert done.stdout.startswith("environment Worker processes cannot start"), done.stderr
    assert reason in done.stdout
    assert "/dev/shm" in done.stdout
    assert done.stderr == ""


def raise_memory_error(number):
    if number == 3:
        raise MemoryError("4 GiB are too many")
    return number


def raise_user_error(number):
    raise UserError("damaged", "the second of two arguments")


def exit_early(number):
    os._exit(7)


def exit_quietly(number):
    os._exit(0)


def crash(number):
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    os.abort()


def unsent(number):
    return threading.Lock()  # cannot be pickled


@pytest.mark.parametrize(
    ("function", "code", "values"),
    [
        (raise_memory_error, "too-large", ["4 GiB", "--workers"]),
        (raise_user_error, "damaged", ["the second of two"]),
        (exit_early, "worker-died", ["status 7", "--workers 0"]),
        (exit_quietly, "worker-died", ["status 0", "--workers 0"]),
        (crash, "worker-died", ["SIGABRT", "--workers 0"]),
        (unsent, "worker-died", ["send", "--workers"]),
    ],
)
def test_a_failing_worker_is_one_error_with_its_cause(function, code, values):
    with user_error(code, *values):
        list(map_in_workers(function, range(8), 2))


def test_a_script_without_a_main_guard_is_told_so(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "multiprocessing.set_start_method('spawn', force=True)\n"
        "from localagg.data.loading.workers import map_in_workers\n"
        "list(map_in_workers(len, [[1], [2]], 1))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, timeout=60, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "UserError" in last
    assert '__name__ == "__main__"' in last
