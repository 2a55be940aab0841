"""Does the memory of one LA step stay under 300 MB at ImageNet's size, whatever N is?

Peak resident memory of a fresh process during one step (search, loss, gradient), less what it held
before: libraries, bank, labels.
"""

import argparse
import resource
import subprocess
import sys

import torch

import report

SIZES = (50_000, 200_000, 1_280_000)


def peak_mb(size: int, batch: int = 128, K: int = 4096, H: int = 10, dim: int = 128) -> float:
    """Extra peak of one step in this process."""
    from localagg.objectives import local_aggregation

    def step(bank: torch.Tensor, labels: torch.Tensor) -> None:
        embedding = torch.nn.functional.normalize(torch.randn(batch, dim), dim=1).requires_grad_()
        index = torch.arange(batch)
        local_aggregation(embedding, bank, labels, index, neighbors=K).backward()

    bank = torch.randn(size, dim)
    for start in range(0, size, 10_000):
        part = bank[start : start + 10_000]
        part /= part.norm(dim=1, keepdim=True)
    labels = torch.randint(0, 30_000, (H, size), dtype=torch.int32)
    step(bank[:8192], labels[:, :8192])  # what is loaded or compiled at first is not the step's
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(bank, labels)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", type=int, help="measure one size and print it")
    one = parser.parse_args().one
    if one:
        print(peak_mb(one))
        return
    rows = []
    for size in SIZES:
        runs = [
            float(subprocess.check_output([sys.executable, __file__, "--one", str(size)]))
            for _ in range(3)
        ]
        rows.append(
            [
                f"{size:,}",
                f"{size * 128 * 4 / 1e6:,.0f}",
                f"{sum(runs) / 3:,.0f}",
                f"{max(runs):,.0f}",
            ]
        )
    report.write(
        "memory",
        "Memory of one LA step (B = 128, K = 4,096, H = 10)",
        ["N", "bank, MB", "step beyond bank and labels, MB (mean of 3)", "largest"],
        rows,
        "The whole B x N product alone would be 655 MB at N = 1,280,000.",
    )


if __name__ == "__main__":
    main()
