"""Threads that compute alone, beside torch's own."""

import subprocess
import sys
from collections import deque

import pytest

from localagg.engine.thread_pool import take_from

_COUNTS = """
import torch
from localagg.engine.thread_pool import in_threads
torch.set_num_threads(3)
def count(part):
    torch.rand(100_000).exp_()  # what a thread has when it computes
    return len(part), torch.get_num_threads()
print(in_threads(count, 7), in_threads(count, 7), torch.get_num_threads())
"""


def test_each_computes_with_one_thread_and_the_caller_keeps_its_own():
    # In a fresh process: torch decides a thread's number when it first computes.
    done = subprocess.run([sys.executable, "-c", _COUNTS], capture_output=True, text=True)
    parts = [(3, 1), (3, 1), (1, 1)]
    assert done.stdout.strip() == f"{parts} {parts} 3"


def test_a_number_is_taken_once_by_whoever_asks_first():
    queue = deque(range(4))
    one, other = take_from(queue), take_from(queue)
    assert [next(one), next(one), next(other), next(one)] == [0, 1, 2, 3]
    assert list(other) == list(one) == []


_RELEASE = """
import os, time
import torch
from localagg.engine import thread_pool
if thread_pool._openmp() is None:
    raise SystemExit(77)
torch.set_num_threads(3)
def threads():
    return set(os.listdir("/proc/self/task"))
def compute():
    return torch.ones(1 << 20).exp_().sum().item()
thread_pool.in_threads(len, 3)  # starts ours
ours = threads()
for _ in range(2):
    value = compute()
    assert len(threads() - ours) == 2, "torch's own threads wait"
    during = thread_pool.in_threads(lambda part: threads(), 3)
    assert all(each <= ours for each in during), (during, ours)
    assert compute() == value
child = os.fork()
if not child:
    os._exit(thread_pool.in_threads(len, 7) != [3, 3, 1])
end = time.monotonic() + 60
while time.monotonic() < end:
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid:
        raise SystemExit(status != 0)
    time.sleep(0.05)
os.kill(child, 9)
raise SystemExit("the forked child waits for threads that it does not have")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("first", ["torch", "localagg"])
def test_no_thread_of_torch_waits_while_ours_compute(first):
    """In either order of import; torch's threads come back, and a forked child computes too."""
    command = [sys.executable, "-c", f"import {first}\n{_RELEASE}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    if done.returncode == 77:
        pytest.skip("torch's OpenMP cannot release its threads")
    assert done.returncode == 0, done.stderr


_NO_THREADS = """
import threading
import torch
from localagg.engine.thread_pool import in_threads
torch.set_num_threads(3)
start, started = threading.Thread.start, []
def refused(self):
    started.append(self)
    if len(started) > 1:
        raise RuntimeError("can't start new thread")
    start(self)
threading.Thread.start = refused
try:
    in_threads(len, 7)
except RuntimeError as error:
    print(error)
"""


def test_a_thread_that_cannot_start_ends_the_others():
    """They wait for it, and Python waits for them when it ends."""
    command = [sys.executable, "-c", _NO_THREADS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.stdout == "can't start new thread\n"
