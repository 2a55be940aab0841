"""IR's softmax by products in bfloat16: how much faster than exact, and how far from float64?

Trained: each query is near its own row, as after some epochs. Random: it is far from all rows.
"""

import argparse
import functools

import neighbors
import torch
import torch.nn.functional as F
from torch import Tensor

import report
from localagg.engine.search import rounded_softmax_backend
from localagg.objectives import instance_softmax

PRECISIONS = ("float32", "bfloat16")


def loss(p: neighbors.Problem, precision: str) -> Tensor:
    return instance_softmax(
        p.v, p.searchable, p.index, temperature=neighbors.T, precision=precision
    )


def errors(p: neighbors.Problem, trained: bool) -> tuple[float, float]:
    """Return the errors of the loss, and of the gradient as a share of its norm."""
    v = p.v.detach().clone()
    if not trained:
        v = F.normalize(torch.randn(v.shape, generator=torch.Generator().manual_seed(1)), dim=1)
    exact = v.double().requires_grad_()
    expected = F.cross_entropy(exact @ p.bank.double().T / neighbors.T, p.index)
    (gradient,) = torch.autograd.grad(expected, exact)
    v.requires_grad_()
    found = instance_softmax(
        v, p.searchable, p.index, temperature=neighbors.T, precision="bfloat16"
    )
    (rounded,) = torch.autograd.grad(found, v)
    return abs(found - expected).item(), ((rounded - gradient).norm() / gradient.norm()).item()


def measure(size: int) -> list[str]:
    """Return the line of one size."""
    problem = neighbors.Problem(size)
    problem.searchable.refresh()
    if not rounded_softmax_backend(problem.searchable):
        raise SystemExit("This CPU does not multiply bfloat16, so the option changes nothing here.")
    ways = {
        name: functools.partial(
            neighbors.gradient, functools.partial(loss, precision=name), problem
        )
        for name in PRECISIONS
    }
    ways |= {
        f"product {name}": functools.partial(neighbors.product, problem, getattr(torch, name))
        for name in PRECISIONS
    }
    times = report.interleaved(ways)
    exact, rounded, single, half = (1e3 * times[name] for name in ways)
    line = [f"{size:,}", f"{exact:.1f}", f"{rounded:.1f}", f"{exact / rounded:.2f}"]
    line += [f"{single / half:.1f}", f"{rounded / half:.1f}"]
    if size > 200_000:  # float64 arrays of the reference
        return [*line, "", "", "", ""]
    return line + [f"{each:.0e}" for kind in (False, True) for each in errors(problem, kind)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 200_000, 1_280_000])
    options = parser.parse_args()
    torch.set_num_threads(neighbors.THREADS)
    neighbors.keep_freed_memory()
    report.write(
        "instance_precision",
        f"IR's exact softmax and --instance-precision bfloat16 (B = {neighbors.B},"
        f" D = {neighbors.D}, t = {neighbors.T})",
        [
            *("N", "exact, ms", "bfloat16, ms", "times faster"),
            *("a product in bfloat16, times faster", "bfloat16 products"),
            *("random: loss off by", "gradient off by", "trained: loss off by", "gradient off by"),
        ],
        [measure(size) for size in options.sizes],
        "Loss and gradient, medians of 7, interleaved, on all cores. A pass needs two products, so"
        " with this CPU it can gain no more than a product does."
        " Errors: of the loss, absolute; of the gradient, as a share of its norm; from float64."
        " Bound of the loss's error: 0.09.",
    )


if __name__ == "__main__":
    main()
