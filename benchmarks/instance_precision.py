"""Could IR's exact softmax gain from products in bfloat16 on this machine?

A pass in bfloat16 needs at least its two products: similarities, and the gradient's mean row. Terms
computed again in float32, exponentials and sums come on top. So the products alone bound what an
option ``--instance-precision bfloat16`` could gain; it would have to be 1.3 times at N = 50,000.
"""

import argparse

import neighbors
import torch

import report

NEEDED = 1.3


def measure(size: int) -> list[str]:
    """Return the line of one size."""
    problem = neighbors.Problem(size)
    problem.searchable.refresh()
    found = report.interleaved(
        {
            "exact": lambda: neighbors.gradient(neighbors.our_softmax, problem),
            "float32": lambda: neighbors.product(problem, torch.float32),
            "bfloat16": lambda: neighbors.product(problem, torch.bfloat16),
        }
    )
    exact, single, half = (1e3 * seconds for seconds in found.values())
    gain = exact / (2 * half)
    verdict = "too little" if gain < NEEDED else "a prototype is worth it"
    times = (f"{each:.1f}" for each in (exact, 2 * single, 2 * half, gain))
    return [f"{size:,}", *times, verdict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000])
    options = parser.parse_args()
    torch.set_num_threads(neighbors.THREADS)
    neighbors.keep_freed_memory()
    report.write(
        "instance_precision",
        f"What IR's softmax could gain from bfloat16 (B = {neighbors.B}, D = {neighbors.D})",
        [
            *("N", "exact loss and gradient, ms", "two float32 products, ms"),
            *("two bfloat16 products, ms", "gain at most, times", f"of {NEEDED} needed"),
        ],
        [measure(size) for size in options.sizes],
        "Medians of 7, interleaved, on all cores. Where a processor lacks units for bfloat16, torch"
        " emulates its products.",
    )


if __name__ == "__main__":
    main()
