"""Does the neighbor engine depend on the order of imports, and how does it fare beside busy jobs?

Processes take turns: torch or localagg imported first, the LA loss with its gradient by ours or
by the later PyTorch port's way (see ``neighbors.py``), each after a few operations of torch, whose
threads then spin as after a network's step.
"""

import importlib
import os
import subprocess
import sys
import time

if len(sys.argv) > 1 and sys.argv[1] == "worker":
    importlib.import_module(sys.argv[2])  # what is compared

import argparse
import statistics
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from neighbors import Problem

ORDERS = ("torch", "localagg")
WAYS = ("ports_way", "ours", "product")
BUSY = (0, 1, 2)


def work(way: str, size: int) -> None:
    """Answer each line of the input with the milliseconds of one call."""
    import neighbors

    torch.set_num_threads(neighbors.THREADS)
    neighbors.keep_freed_memory()
    problem = neighbors.Problem(size)
    problem.searchable.refresh()
    for _ in sys.stdin:
        spin()
        start = time.perf_counter()
        call(way, problem)
        print(1e3 * (time.perf_counter() - start), flush=True)


def call(way: str, problem: "Problem") -> None:
    import neighbors

    if way == "product":
        neighbors.product(problem, problem.searchable.product_dtype)
    else:
        neighbors.gradient(getattr(neighbors, way), problem)


def spin() -> None:
    """Compute what a small network might, so that torch's threads wait for more."""
    square = torch.ones(512, 512)
    for _ in range(4):
        square = torch.relu(square @ square / 512)


class Worker:
    """A process that times one way after another process's turn."""

    def __init__(self, order: str, way: str, size: int) -> None:
        command = [sys.executable, __file__, "worker", order, way, str(size)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)

    def milliseconds(self) -> float:
        assert self.process.stdin
        assert self.process.stdout
        print(file=self.process.stdin, flush=True)
        return float(self.process.stdout.readline())


def measure(size: int, runs: int) -> list[list[str]]:
    """Return the lines of one size."""
    workers = {(order, way): Worker(order, way, size) for order in ORDERS for way in WAYS}
    lines = []
    for busy in BUSY:
        jobs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        found: dict[tuple[str, str], list[float]] = {each: [] for each in workers}
        for run in range(runs + 2):
            for each, worker in workers.items():
                milliseconds = worker.milliseconds()
                if run > 1:  # the first rounds warm up
                    found[each].append(milliseconds)
                time.sleep(0.02)  # until the worker's threads sleep
        for job in jobs:
            job.kill()
            job.wait()
        for order in ORDERS:
            port, ours, product = (statistics.median(found[order, way]) for way in WAYS)
            times = [f"{each:.1f}" for each in (port, ours, product, port / ours, ours / product)]
            lines.append([f"{size:,}", str(busy), order, *times])
    for worker in workers.values():
        worker.process.kill()
        worker.process.wait()
    return lines


def main() -> None:
    import report

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=(50_000, 200_000))
    parser.add_argument("--runs", type=int, default=25)
    options = parser.parse_args()
    load = os.getloadavg()[0]
    report.write(
        "neighbors_busy",
        "The neighbor engine beside busy jobs, in both orders of import",
        [
            *("N", "busy jobs", "imported first", "port's way, ms", "ours, ms"),
            *("product alone, ms", "times faster", "products"),
        ],
        [line for size in options.sizes for line in measure(size, options.runs)],
        f"Medians of {options.runs}. A product is one of the first pass, in bfloat16 where the CPU"
        " has units for it, else in float32, by the same threads. Other jobs of this"
        f" machine, besides: a load of {load:.0f}.",
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        work(sys.argv[3], int(sys.argv[4]))
    else:
        main()
