"""What does an exact step of LA, or of IR's softmax, cost beside the usual ways and the hardware?

B = 128 queries of 128 numbers, K = 4,096 background neighbors, H = 10 clusterings; the loss and its
gradient in the queries. Times are interleaved in one process; memory is the extra peak of a fresh
process each, beyond bank, labels and (where the way has one) the bank's bfloat16 copy.
"""

import argparse
import ctypes
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import report
from localagg.engine import SETTINGS
from localagg.engine.search import nearest, similarities, store_by_row
from localagg.engine.searchable_bank import SearchableBank, product_dtype
from localagg.engine.thread_pool import in_threads
from localagg.io.machine import keep_freed_memory
from localagg.objectives import instance_softmax, local_aggregation

B, D, K, H, T, EPS = 128, 128, 4096, 10, 0.07, 1e-7
SIZES = (50_000, 200_000, 1_280_000)
LARGEST = 5_000_000  # ours alone: does the cost grow linearly?
THREADS = len(os.sched_getaffinity(0))
FAST = product_dtype(torch.empty(1, D))  # of the first pass: bfloat16 if the CPU has units for it
GOALS = {50_000: 3.5, 200_000: 2.5, 1_280_000: 1.5}  # LA, in products of that type


class Problem:
    """A bank, labels and queries of one size; unit rows, one image in 43 to a cluster."""

    def __init__(self, size: int, dtype: torch.dtype = torch.float32) -> None:
        generator = torch.Generator().manual_seed(0)
        self.bank = torch.empty(size, D, dtype=dtype)
        for start in range(0, size, 1 << 16):
            part = self.bank[start : start + (1 << 16)]
            part.copy_(F.normalize(torch.randn(part.shape, generator=generator), dim=1))
        self.labels = torch.randint(
            0, max(2, size // 43), (H, size), dtype=torch.int32, generator=generator
        )
        self.labels_by_row = store_by_row(self.labels)
        self.long_labels = self.labels.long()
        self.index = torch.randint(size, (B,), generator=generator)
        near = self.bank[self.index].float() + torch.randn(B, D, generator=generator) * D**-0.5
        self.v = F.normalize(near, dim=1).requires_grad_()
        self.searchable = SearchableBank(self.bank)
        self.neighbors: torch.Tensor | None = None


# --- LA by the ways that others take ---


def ports_way(p: Problem) -> torch.Tensor:
    """As the later PyTorch port: the whole product kept for autograd, its top-k, H gathers of int64
    labels in turn, sums of exp over two [B, K] arrays."""
    sim_BK, top_BK = torch.topk(p.v @ p.bank.T, K, dim=1, sorted=False)
    weight_BK = torch.exp(sim_BK / T)
    close_BK = torch.zeros(B, K, dtype=torch.uint8)
    for labels_N in p.long_labels:
        close_BK |= (labels_N[p.index].unsqueeze(1).repeat(1, K) == labels_N[top_BK]).byte()
    near_BK = torch.where(close_BK.bool(), weight_BK, torch.zeros_like(weight_BK))
    return -torch.log(near_BK.sum(dim=1) / weight_BK.sum(dim=1) + EPS).mean()


def clean_torch(p: Problem) -> torch.Tensor:
    """One product and autograd through its top-k."""
    sim_BK, top_BK = torch.topk(p.v @ p.bank.T, K, dim=1)
    close_BK = (p.labels[:, top_BK] == p.labels[:, p.index, None]).any(dim=0)
    return -torch.log((F.softmax(sim_BK / T, dim=1) * close_BK).sum(dim=1) + EPS).mean()


def ours(p: Problem) -> torch.Tensor:
    return local_aggregation(p.v, p.searchable, p.labels_by_row, p.index, neighbors=K)


def ours_once(p: Problem) -> torch.Tensor:
    """Without a copy of the bank, as a single call has none."""
    return local_aggregation(p.v, p.bank, p.labels, p.index, neighbors=K)


def ours_portable(p: Problem) -> torch.Tensor:
    with SETTINGS.changed(min_compiled_rows=sys.maxsize):
        return local_aggregation(p.v, p.bank, p.labels, p.index, neighbors=K)


# --- IR's exact softmax ---


def whole_softmax(p: Problem) -> torch.Tensor:
    return F.cross_entropy(p.v @ p.bank.T / T, p.index)


def our_softmax(p: Problem) -> torch.Tensor:
    return instance_softmax(p.v, p.bank, p.index, temperature=T)


LOSSES = {
    "LA": {
        "the port's way": ports_way,
        "clean torch": clean_torch,
        "ours, torch alone": ours_portable,
        "ours, no copy": ours_once,
        "ours": ours,
    },
    "IR": {"whole product": whole_softmax, "ours": our_softmax},
}


def gradient(way, p: Problem) -> torch.Tensor:
    return torch.autograd.grad(way(p), p.v)[0]


# --- The floors ---


def product(p: Problem, dtype: torch.dtype) -> None:
    """The products alone, in tiles of a core's cache."""
    queries = p.v.detach().to(dtype)
    bank = p.searchable.rounded if dtype == FAST else p.bank
    assert bank is not None

    def tiles(part: range) -> None:
        out = torch.empty(B, 2048, dtype=dtype)
        for start in range(part.start, part.stop, 2048):
            rows = bank[start : min(part.stop, start + 2048)].to(dtype)
            torch.mm(queries, rows.T, out=out[:, : len(rows)].contiguous())

    in_threads(tiles, len(bank))


def read(rows: torch.Tensor) -> None:
    in_threads(lambda part: rows[part.start : part.stop].view(torch.int32).amax(), len(rows))


def neighbors_of(p: Problem) -> torch.Tensor:
    """The K nearest rows of each query, found once."""
    if p.neighbors is None:
        p.neighbors = nearest(p.v.detach(), p.searchable, K)[0]
    return p.neighbors


def score_neighbors(p: Problem) -> None:
    similarities(p.v.detach(), p.bank, neighbors_of(p))


def weigh_neighbors(p: Problem) -> None:
    rows = neighbors_of(p)
    F.embedding_bag(rows, p.bank, per_sample_weights=torch.ones(rows.shape), mode="sum")


FLOORS = {
    "float32 product alone": lambda p: product(p, torch.float32),
    "bfloat16 product alone": lambda p: product(p, torch.bfloat16),
    "reading the float32 bank": lambda p: read(p.bank),
    "reading the copy of the first pass": lambda p: read(p.searchable.rounded),
    "float32 products with the K neighbors": score_neighbors,
    "weighted sum of the K neighbors": weigh_neighbors,
}
EMULATED = "" if FAST is torch.bfloat16 else "bfloat16 product alone"  # too slow for large N


# --- Memory, and what a bfloat16 bank changes ---


def peak_mib(loss: str, way: str, size: int) -> float:
    """Extra peak of one step in this process."""
    small, p = Problem(8192), Problem(size)
    gradient(LOSSES[loss][way], small)  # what libraries load on first use is not the step's
    if way == "ours" and loss == "LA":
        p.searchable.refresh()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed before would hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    gradient(LOSSES[loss][way], p)
    return (resident("VmHWM") - before) / 2**20


def resident(kind: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def in_a_process(*arguments: str) -> str:
    return subprocess.check_output([sys.executable, __file__, *arguments], text=True).strip()


def effect_of_bfloat16(p: Problem) -> str:
    """What rounding the bank's rows does to the LA loss and its gradient."""
    q = Problem(len(p.bank))
    q.bank = p.bank.bfloat16()
    q.searchable = SearchableBank(q.bank)
    moved = abs(ours(q).item() / ours(p).item() - 1)
    exact, other = gradient(ours, p), gradient(ours, q)
    relative = (other - exact).norm() / exact.norm()
    return (
        f"A bank in bfloat16 (N = {len(p.bank):,}) moves the LA loss by {moved:.1e} of its size and"
        f" its gradient by {relative:.1e}."
    )


def timings(p: Problem) -> dict[tuple[str, str], float]:
    """Seconds of each floor and way."""
    p.searchable.refresh()
    floors = [name for name in FLOORS if name != EMULATED or len(p.bank) <= SIZES[0]]
    calls = {("floor", name): lambda f=FLOORS[name]: f(p) for name in floors}
    for loss, ways in LOSSES.items():
        calls |= {(loss, n): lambda w=w: gradient(w, p) for n, w in ways.items()}
    return report.interleaved(calls, runs=15 if len(p.bank) <= 200_000 else 5)


def measure(size: int) -> tuple[list[list[str]], str, str]:
    """The lines of one size, and sentences about a bank in bfloat16 and about the goal."""
    seconds, note = (f(Problem(size)) for f in (timings, effect_of_bfloat16))
    lines, unit = [], seconds["floor", f"{str(FAST).removeprefix('torch.')} product alone"]
    for (loss, name), found in seconds.items():
        line = [f"{size:,}", loss, name, f"{1e3 * found:.1f}", ""]
        if loss in LOSSES:
            line[-1] = f"{seconds[(loss, next(iter(LOSSES[loss])))] / found:.1f}"
        line.append(f"{found / unit:.1f}")
        memory = in_a_process("--memory", loss, name, str(size)) if loss in LOSSES else ""
        lines.append([*line, f"{float(memory):,.0f}" if memory else ""])
    products = seconds["LA", "ours"] / unit
    goal = f"{products:.1f} products at N = {size:,}"
    if size in GOALS:
        met = "met" if products <= GOALS[size] else "not met"
        goal += f" (goal {GOALS[size]}: {met})"
    return lines, note, goal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--largest", type=int, default=LARGEST, help="0 leaves it out")
    parser.add_argument("--memory", nargs=3, help="measure one way's memory, and print it")
    parser.add_argument("--largest-alone", type=int, help="time ours at one size, and print it")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.memory:
        loss, way, size = options.memory
        print(peak_mib(loss, way, int(size)))
        return
    keep_freed_memory()
    if options.largest_alone:
        large = Problem(options.largest_alone)
        print(report.interleaved({"ours": lambda: gradient(ours, large)}, runs=5)["ours"])
        return
    rows, notes, goals = [], [], []
    for size in options.sizes:
        table, note, goal = measure(size)
        rows += table
        notes.append(note)
        goals.append(goal)
    if options.largest:
        size = str(options.largest)
        found = float(in_a_process("--largest-alone", size))
        memory = float(in_a_process("--memory", "LA", "ours", size))
        rows.append(
            [f"{int(size):,}", "LA", "ours", f"{1e3 * found:.1f}", "", "", f"{memory:,.0f}"]
        )
    report.write(
        "neighbors",
        f"The neighbor engine (B = {B}, D = {D}, K = {K:,}, H = {H}, {THREADS} threads)",
        ["N", "loss", "way", "ms", "x first way", "products", "extra MiB"],
        rows,
        "Loss and gradient, medians of 15 (1,280,000 and more: 5), interleaved; freed memory is"
        f" kept, as in training. A product is one of the first pass, here in {FAST}. LA takes"
        f" {', '.join(goals)}. {notes[0]} GPU: not measured.",
    )


if __name__ == "__main__":
    main()
