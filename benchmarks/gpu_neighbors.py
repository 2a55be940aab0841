"""On a GPU: is LA, and the exact softmax, near the cost of reading the bank once?

Forward and backward of both losses, beside the ways that others compute them and the floors under
any way: the product alone and the reading of the bank. Milliseconds by CUDA events, the calls
taking turns; memory beyond the inputs and the bank's half-precision copy by
``torch.cuda.max_memory_allocated``. The rows found are compared with torch's float64 product and
top-k, and PyTorch's profiler tells where a step of LA spends its time.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from importlib.metadata import version

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import report
from localagg.engine.search import store_by_row
from localagg.engine.searchable_bank import SearchableBank
from localagg.objectives import instance_softmax, local_aggregation

TEMPERATURE = 0.07
Ways = dict[str, Callable[[], object]]


# --- The plain ways -------------------------------------------------------------------------------


def ports_way(v: Tensor, bank: Tensor, labels: Tensor, index: Tensor, neighbors: int) -> Tensor:
    """LA as the PyTorch port of the reference computes it: whole product, top-k, H gathers."""
    exp_BN = torch.exp(v @ bank.T / TEMPERATURE)
    top_BK = torch.topk(exp_BN.detach(), neighbors, dim=1).indices
    close_BK = torch.zeros_like(top_BK, dtype=torch.bool)
    for labels_N in labels:
        close_BK |= labels_N[top_BK] == labels_N[index].unsqueeze(1)
    background_BK = exp_BN.gather(1, top_BK)
    share_B = (background_BK * close_BK).sum(dim=1) / background_BK.sum(dim=1)
    return -torch.log(share_B + 1e-7).mean()


def whole_softmax(v: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    """The exact softmax with B x N held and saved for backward."""
    return F.cross_entropy(v @ bank.T / TEMPERATURE, index)


# --- What is timed --------------------------------------------------------------------------------


class Task:
    """Drawn unit rows around centers, as a bank in training has them, and a batch of queries."""

    def __init__(self, size: int, batch: int, dim: int, neighbors: int, device: str) -> None:
        torch.manual_seed(0)
        centers = F.normalize(torch.randn(1 + size // 40, dim, device=device), dim=1)
        own = torch.randint(len(centers), (size,), device=device)
        noise = torch.randn(size, dim, device=device) * dim**-0.5
        self.bank = F.normalize(centers[own] + noise, dim=1)
        self.index = torch.randint(size, (batch,), device=device)
        noise = torch.randn(batch, dim, device=device) * dim**-0.5
        self.v = F.normalize(self.bank[self.index] + 0.5 * noise, dim=1).requires_grad_()
        others = [torch.randint(len(centers), (size,), device=device) for _ in range(9)]
        self.labels = torch.stack([own, *others]).int()
        self.side_by_side = store_by_row(self.labels)
        self.searchable = SearchableBank(self.bank).refresh()
        self.neighbors = neighbors

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.v)[0]

    def la(self) -> Tensor:
        options = {"neighbors": self.neighbors}
        loss = local_aggregation(self.v, self.searchable, self.side_by_side, self.index, **options)
        return self.gradient(loss)

    def ways(self) -> Ways:
        v, bank, index = self.v, self.bank, self.index
        v_half, coarse = v.detach().half(), self.searchable.rounded
        half = bank.half() if coarse is None else coarse.half()
        return {
            "LA, ours": self.la,
            "LA, the port's way": lambda: self.gradient(
                ports_way(v, bank, self.labels, index, self.neighbors)
            ),
            "product and top-k alone": lambda: (v.detach() @ bank.T).topk(self.neighbors, dim=1),
            "exact softmax, ours": lambda: self.gradient(instance_softmax(v, bank, index)),
            "exact softmax, whole product": lambda: self.gradient(whole_softmax(v, bank, index)),
            "float16 product alone": lambda: v_half @ half.T,
            "reading the bank, float32": lambda: bank.sum(),
            "reading the bank, float16": lambda: half.view(torch.int32).max(),
        }

    def unlike(self, queries: int = 16) -> int:
        """Rows of the first queries that float64 ranks below the K-th by more than rounding."""
        from localagg.engine import cuda_backend as engine

        v = self.v.detach()[:queries]
        rows, _ = engine.top_rows(v, self.bank, self.neighbors, bank_low=self.searchable.rounded)
        sim = v.double() @ self.bank.double().T
        kth = sim.topk(self.neighbors, dim=1).values[:, -1:]
        return int((sim.gather(1, rows) < kth - 1e-6).sum())


def milliseconds(ways: Ways, runs: int) -> dict[str, float]:
    """Medians by CUDA events, the calls taking turns; three rounds before compile and warm up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for run in range(runs + 3):
        for name, way in ways.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(1_000_000)  # so that launches queue, and the host is not timed
            start.record()
            way()
            end.record()
            end.synchronize()
            if run >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def extra_mib(way: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    way()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def kernels_of(way: Callable[[], object], steps: int = 20) -> str:
    """Microseconds a step of each kernel, the longest first."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            way()
        torch.cuda.synchronize()
    found = {}
    for event in profiler.key_averages():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found[event.key] = event.self_device_time_total / steps
    longest = sorted(found.items(), key=lambda item: -item[1])[:14]
    return ", ".join(f"{name.split('(')[0][:40]} {time:.1f}" for name, time in longest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 200_000, 1_280_000])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--neighbors", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=21)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU on this machine: nothing was measured.")
        sys.exit(2)
    rows, notes = [], []
    for size in options.sizes:
        task = Task(size, options.batch, options.dim, options.neighbors, "cuda")
        ways = task.ways()
        times = milliseconds(ways, options.runs)
        for name, way in ways.items():
            other = (
                "LA, the port's way" if name.startswith("LA") else "exact softmax, whole product"
            )
            ratio = f"{times[other] / times[name]:.1f}" if "LA" in name or "softmax" in name else ""
            rows.append([f"{size:,}", name, f"{times[name]:.3f}", ratio, f"{extra_mib(way):,.0f}"])
        notes.append(
            f"N = {size:,}: {task.unlike()} rows unlike float64's. Kernels of a step of LA, in"
            f" microseconds: {kernels_of(task.la)}; of the exact softmax:"
            f" {kernels_of(ways['exact softmax, ours'])}."
        )
    report.write(
        "gpu_neighbors",
        f"LA and the exact softmax on a GPU, forward and backward (B = {options.batch},"
        f" D = {options.dim}, K = {options.neighbors:,}, H = 10)",
        ["N", "what", f"ms (median of {options.runs})", "x the usual way", "extra MiB"],
        rows,
        "\n\n".join([*notes, f"triton {version('triton')}."]),
    )


if __name__ == "__main__":
    main()
