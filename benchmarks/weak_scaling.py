"""What does an LA step cost on two processes beside one, each with a core of its own?

Weak scaling: the work of a process stays. Either each brings its 128 samples to one bank of N rows,
of which it holds half; or each brings N rows to a bank of twice as many, asked about by 128 samples
in all. A step is search, loss, gradient and the update of the bank, over gloo on the loopback.

Two processes also share memory and caches, which no program can help; so the step of one process
is timed beside a second one that does the same at the same time without talking to it.
"""

import argparse
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F

import report
from localagg.bank import MemoryBank
from localagg.distributed.collectives import World
from localagg.distributed.differentiable import gather_rows
from localagg.engine.search import store_by_row
from localagg.io.machine import keep_freed_memory
from localagg.objectives import local_aggregation

B, D, H = 128, 128, 3


class Job(NamedTuple):
    """A step on one process or on two."""

    processes: int
    rows: int
    """Of the whole bank."""
    samples: int
    """Of all processes."""


class Step:
    """Everything that one process holds of a job."""

    def __init__(self, job: Job, world: World, neighbors: int) -> None:
        self.world, self.neighbors, self.samples = world, neighbors, job.samples
        generator = torch.Generator().manual_seed(0)
        self.bank = MemoryBank(job.rows, D, part=world.part(job.rows))
        clusters = max(2, job.rows // 64)
        shape = (H, len(self.bank.rows))
        labels = torch.randint(0, clusters, shape, generator=generator, dtype=torch.int32)
        self.labels = store_by_row(labels)  # as in training
        part = world.part(job.samples)
        own = slice(part.start, part.stop)
        v = F.normalize(torch.randn(job.samples, D, generator=generator), dim=1)
        self.v = v[own].contiguous().requires_grad_()
        self.index = torch.randint(0, job.rows, (job.samples,), generator=generator)[own]

    def __call__(self) -> None:
        v = gather_rows(self.world, self.v, self.samples, torch.float32)
        index = self.world.gather(self.index, self.samples)
        shard = self.bank.shard(self.world)
        loss = local_aggregation(v, shard, self.labels, index, neighbors=self.neighbors)
        torch.autograd.grad(loss, self.v)
        self.bank.update(index, v.detach())


def serve(rank: int, core: int, store: str, jobs: list[Job], K: int, pipe: Connection) -> None:
    """Time the step of each job that is asked for, on one core."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    worlds = {1: World(), 2: World.current()}
    steps = {job: Step(job, worlds[job.processes], K) for job in jobs}
    while (job := pipe.recv()) is not None:
        begin = time.perf_counter()
        steps[job]()
        pipe.send(time.perf_counter() - begin)
    dist.destroy_process_group()


def timed(pipes: list[Connection], job: Job) -> float:
    """Seconds of a step on the given processes: of the slower one."""
    for pipe in pipes:
        pipe.send(job)
    return max(pipe.recv() for pipe in pipes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000, help="N")
    parser.add_argument("--neighbors", type=int, default=4096, help="K")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    N, K = options.rows, options.neighbors
    one, samples_grow, rows_grow = Job(1, N, B), Job(2, N, 2 * B), Job(2, 2 * N, B)
    jobs = [one, samples_grow, rows_grow]
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("Two cores are needed.")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes, processes = [], []
        for rank, core in enumerate(cores):
            here, there = context.Pipe()
            arguments = (rank, core, f"{folder}/store", jobs, K, there)
            processes.append(context.Process(target=serve, args=arguments, daemon=True))
            processes[-1].start()
            pipes.append(here)
        cases = {
            "one process, alone": (pipes[:1], one),
            "one process, beside another at the same": (pipes, one),
            "two processes, each with its samples": (pipes, samples_grow),
            "two processes, each with its rows": (pipes, rows_grow),
        }
        seconds: dict[str, list[float]] = {name: [] for name in cases}
        for round_ in range(options.rounds + 1):
            for name, (asked, job) in cases.items():
                found = timed(asked, job)
                if round_:  # the first round warms up
                    seconds[name].append(found)
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join()
    median = {name: statistics.median(found) for name, found in seconds.items()}
    alone, beside = list(median.values())[:2]
    rows = []
    for name, (_, job) in cases.items():
        held = -(-job.rows // job.processes) * (4 * D + 4 * H) / 1e6
        spent = median[name]
        sizes = [f"{job.rows:,}", f"{job.samples}", f"{held:,.0f}"]
        rows.append(
            [name, *sizes, f"{1e3 * spent:.1f}", f"{alone / spent:.0%}", f"{beside / spent:.0%}"]
        )
    report.write(
        "weak_scaling",
        f"Weak scaling of the LA step (D = {D}, K = {K:,}, H = {H}; a core to each process)",
        [
            *("processes", "N", "samples", "bank and labels, MB a process"),
            *("ms a step", "efficiency", "of two that do not talk"),
        ],
        rows,
        f"Medians of {options.rounds} interleaved rounds; of two processes the slower one counts."
        " gloo over the loopback.",
    )


if __name__ == "__main__":
    main()
