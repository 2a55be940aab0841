"""Threads that compute alone, beside torch's own."""

import subprocess
import sys

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
