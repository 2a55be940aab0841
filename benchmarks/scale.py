"""What would a step of LA cost with banks and numbers of ranks that this machine does not have?

A model with few parameters. Every rate of "a core here" is measured by this script, in one process
and between two over gloo on the loopback; those of an H100 are arithmetic from its data sheet and
from products and reads measured on a GPU of its kind, and say so. The model is held against the one
thing that can be measured here: a step of two processes.

Work of a rank, with b samples a rank, R ranks, B = b R, N rows, K neighbors, H clusterings of k
clusters: B N / R similarities, b K rows gathered, the selection among b K candidates, and the
collectives of ``engine.bank_shard`` and ``objectives``, as a ring sends them.
"""

import argparse
import math
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
from localagg.engine.kmeans import Points
from localagg.engine.topk import largest
from localagg.objectives import local_aggregation

b, D, K, H, CLUSTERS, ITERATIONS = 128, 128, 4096, 10, 30_000, 20
ROWS = (1_281_167, 14_000_000, 100_000_000, 1_000_000_000)
RANKS = (1, 8, 64, 512)
DIGITS = 4  # of the selection, as a rule


class Rates(NamedTuple):
    """What a rank can do, and where that is known from."""

    name: str
    similarities: float
    """Of queries with rows, a second."""
    query: float
    """Seconds for the K neighbors of a query: rescoring, loss and gradient."""
    candidate: float
    """Seconds to select among candidates, each."""
    assignments: float
    """Of rows to centroids compared, a second, in k-means."""
    latency: tuple[float, float]
    """Seconds of a collective among neighbors, and what each doubling of the ranks adds."""
    bandwidth: tuple[float, float]
    """Bytes a second that a rank sends: up to 8 ranks, and beyond."""
    source: str


# Section by section: 128 x 1.28 M similarities in the 68 us of reading a bf16 bank (the product
# alone takes 53 us), 128 x 4,096 rows gathered in 56 us, 1.28 M rows against 30,000 centroids in
# 16 ms: measured rates of an H200 at 790 TFLOP/s and 4.3 TB/s, here scaled to an H100's 3.35 TB/s
# where memory is the limit. NVLink 900 GB/s both ways, 400 Gb/s a GPU between nodes: data sheets of
# H100 SXM and DGX H100. The latencies are assumed.
_MEMORY = 3.35 / 4.3
H100 = Rates(
    "an H100, by arithmetic",
    128 * 1.28e6 / 68e-6 * _MEMORY,
    56e-6 / 128 / _MEMORY,
    10 * 4 / 3.35e12,
    30_000 * 1.28e6 / 16e-3,
    (15e-6, 5e-6),
    (450e9, 50e9),
    "H100: bank read, product, gather and k-means by arithmetic from rates measured on an H200 and"
    " the data sheets' memory and links; ten passes of 4 bytes over candidates; latencies assumed.",
)


# --- The model ------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Of a rank."""

    gigabytes: float
    compute: float
    wire: float
    sent: float
    recluster: float


def traffic(samples: int, ranks: int) -> tuple[int, float]:
    """(collectives, bytes that a rank sends) of a step, in float32."""
    if ranks == 1:
        return 0, 0.0
    B, others = samples * ranks, (ranks - 1) / ranks
    gathered = B * (4 * D + 8)
    reduced = B * (4 * H + 12 + 12 + DIGITS * 256 + 16)
    scattered = 4 * B * D
    return 8 + DIGITS, others * (gathered + 2 * reduced + scattered)


def cost(rates: Rates, rows: int, ranks: int, *, clusterings: int = H) -> Cost:
    """What the model says."""
    collectives, sent = traffic(b, ranks)
    doublings = math.log2(ranks)
    latency = rates.latency[0] + rates.latency[1] * doublings
    bandwidth = rates.bandwidth[ranks > 8]
    compute = b * rows / rates.similarities + b * rates.query
    if ranks > 1:
        compute += b * K * rates.candidate
    totals = 8 * CLUSTERS * (D + 1)  # summed over ranks in each pass
    passes = clusterings * (ITERATIONS + 1)
    reduced = 2 * (ranks - 1) / ranks * totals / bandwidth + (latency if ranks > 1 else 0)
    return Cost(
        rows / ranks * (4 * D + 2 * D + 4 * H) / 1e9,
        compute,
        collectives * latency + sent / bandwidth,
        sent,
        passes * (rows / ranks * CLUSTERS / rates.assignments + reduced),
    )


# --- The rates of this machine --------------------------------------------------------------------


class Echo(World):
    """A rank whose fellows have nothing to say: the work of sharing without the wire."""

    def _all_reduce(self, tensor, operation):
        pass

    def _all_gather(self, out, tensor):
        out.copy_(tensor.repeat(self.size))


def median(call, runs: int = 7) -> float:
    call()
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def step_of(world: World, rows: int):
    """A step of LA on this rank, ready to be called."""
    generator = torch.Generator().manual_seed(world.rank)
    bank = MemoryBank(rows, D, part=world.part(rows))
    labels = torch.randint(0, 3000, (H, len(bank.rows)), generator=generator, dtype=torch.int32)
    v = F.normalize(torch.randn(b, D, generator=generator), dim=1).requires_grad_()
    index = torch.randint(0, rows, (b,), generator=generator)

    def step() -> None:
        v_BD = gather_rows(world, v, b * world.size, torch.float32)
        index_B = world.gather(index, b * world.size)
        loss = local_aggregation(v_BD, bank.shard(world), labels, index_B, neighbors=K)
        torch.autograd.grad(loss, v)
        bank.update(index_B, v_BD.detach())

    return step


def alone(sizes: list[int]) -> dict[str, float]:
    """Rates of this process."""
    small, large = sizes
    seconds = [median(step_of(World(), size)) for size in sizes]
    similarities = b * (large - small) / (seconds[1] - seconds[0])
    generator = torch.Generator().manual_seed(0)
    value, row = torch.rand(b, K, generator=generator), torch.arange(K).expand(b, K)
    between = torch.zeros(b), torch.ones(b)
    selected = median(lambda: largest(Echo(0, 2), value, row, K // 2, between))
    rows = Points(F.normalize(torch.randn(20_000, D, generator=generator), dim=1))
    centroids = F.normalize(torch.randn(4096, D, generator=generator), dim=1)
    assigned = median(lambda: rows.assign(centroids, exact=False), runs=3)
    return {
        "similarities": similarities,
        "query": max(0.0, seconds[0] / b - small / similarities),
        "candidate": selected / (b * K),
        "assignments": len(rows.rows) * len(centroids) / assigned,
    }


def serve(rank: int, core: int, store: str, sizes: list[int], pipe: Connection) -> None:
    """Measure on one core: alone if first, then together."""
    os.sched_setaffinity(0, {core})
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    found = alone(sizes) if rank == 0 else {}
    dist.barrier()
    small, large = torch.zeros(16), torch.zeros(1 << 20)
    found["latency"] = median(lambda: dist.all_reduce(small), runs=100)
    whole = median(lambda: dist.all_reduce(large), runs=30)
    found["bandwidth"] = large.nbytes / max(1e-9, whole - found["latency"])  # 2 (R-1)/R = 1
    found["step"] = median(step_of(World.current(), sizes[1]), runs=9)
    pipe.send(found)
    dist.destroy_process_group()


def measured(sizes: list[int]) -> tuple[Rates, float]:
    """The rates of a core here, and the seconds of a step of two processes, ``sizes[1]`` rows."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("Two cores are needed.")
    context, pipes, processes = multiprocessing.get_context("spawn"), [], []
    with tempfile.TemporaryDirectory() as folder:
        for rank, core in enumerate(cores):
            here, there = context.Pipe()
            arguments = (rank, core, f"{folder}/store", sizes, there)
            processes.append(context.Process(target=serve, args=arguments, daemon=True))
            processes[-1].start()
            pipes.append(here)
        first, second = (pipe.recv() for pipe in pipes)
        for process in processes:
            process.join()
    latency, bandwidth = first["latency"], first["bandwidth"]
    names = ("similarities", "query", "candidate", "assignments")
    rates = Rates(
        "a core here",
        *(first[name] for name in names),
        (latency, latency),
        (bandwidth, bandwidth),
        f"A core here, measured: {first['similarities'] / 1e9:.1f} G similarities/s,"
        f" {1e6 * first['query']:.0f} us a query, {1e9 * first['candidate']:.1f} ns a candidate,"
        f" {first['assignments'] / 1e9:.1f} G assignments/s; gloo over the loopback"
        f" {1e6 * latency:.0f} us (assumed again for each doubling), {bandwidth / 1e9:.2f} GB/s.",
    )
    return rates, max(first["step"], second["step"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs=2, default=[50_000, 200_000], help="of the fit")
    sizes = parser.parse_args().sizes
    here, two = measured(sizes)
    model = cost(here, sizes[1], 2)
    predicted = model.compute + model.wire
    table = []
    for rates in (here, H100):
        for rows in ROWS:
            for ranks in RANKS:
                found = cost(rates, rows, ranks)
                fits = "" if rates is here or found.gigabytes < 80 else " (does not fit)"
                table.append(
                    [
                        rates.name,
                        f"{rows:,}",
                        ranks,
                        f"{found.gigabytes:,.2f}{fits}",
                        f"{1e3 * found.compute:,.2f}",
                        f"{1e3 * found.wire:,.2f}",
                        f"{found.sent / 1e6:,.1f}",
                        f"{found.recluster:,.0f}",
                    ]
                )
    report.write(
        "scale",
        f"A model of LA at scale ({b} samples a rank, D = {D}, K = {K:,}, H = {H} clusterings)",
        [
            *("a rank is", "N", "ranks", "bank, copy and labels, GB a rank"),
            *("step: compute, ms", "step: wire, ms", "sent a rank and step, MB"),
            f"{H} cold clusterings of {CLUSTERS:,}, s",
        ],
        table,
        f"{here.source} {H100.source} Of two processes here with N = {sizes[1]:,} the model says"
        f" {1e3 * predicted:.1f} ms a step; measured: {1e3 * two:.1f} ms. The network's own forward"
        " and backward, and DDP's sum of its gradients, come on top. Each rank also holds the order"
        " of an epoch: 8 bytes a row of host memory, 24 while it is drawn.",
    )


if __name__ == "__main__":
    main()
