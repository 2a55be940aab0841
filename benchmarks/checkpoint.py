"""What do checkpoints cost: a share of the cifar10 recipe's time, and seconds of a large bank?

The share is what one run of the recipe, of a few epochs at its own interval, noted itself: seconds
inside checkpoints (the wait for the disk included) over seconds of steps, checkpoints and
clusterings. The large checkpoint is that of a ResNet-18 with momenta, a bank of 1,280,000 rows of
128 numbers and ten clusterings; beside it the same bytes written and flushed as plainly as can be.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

import report
from localagg import checkpoint
from localagg.bank import MemoryBank
from localagg.config import PretrainConfig, override
from localagg.models import create_encoder
from localagg.recipes.builtin import recipe
from localagg.training.runs import pretrain

NO_STEP = ("measuring", "health")


def of_recipe(data: str, place: Path, epochs: int) -> list[str]:
    """A row: the recipe's run."""
    config = override(recipe("cifar10").config, epochs=epochs, ir_epochs=epochs - 1, eval_every=0)
    save, times = checkpoint.save, []

    def timed(*arguments, **options):
        start = time.perf_counter()
        folder = save(*arguments, **options)
        times.append(time.perf_counter() - start)
        return folder

    checkpoint.save = timed
    try:
        found = pretrain(config, data, place / "run")
    finally:
        checkpoint.save = save
    folder = checkpoint.latest(place / "run")
    seconds = checkpoint.read_progress(folder)["shares"]
    steps = sum(spent for part, spent in seconds.items() if part not in (*NO_STEP, "checkpoint"))
    size = sum(file.stat().st_size for file in folder.iterdir())
    every = f"every {config.checkpoint_seconds:.0f} s and epoch"
    return [
        f"cifar10 recipe, {epochs} epochs, {found['steps']:,} steps, {every}",
        f"{size / 1e6:,.0f}",
        f"{statistics.median(times):.2f} (median of {len(times)})",
        f"{seconds['checkpoint'] / steps:.2%} of the steps' {steps:.0f} s",
    ]


def of_bank(place: Path, size: int, runs: int) -> list[list[str]]:
    """Rows: a whole checkpoint of a large bank, and its bytes alone."""
    encoder = create_encoder("resnet18", dim=128, seed=0)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1, momentum=0.9)
    for parameter in encoder.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    bank = MemoryBank(size, 128, seed=0)
    labels = torch.randint(0, 30_000, (10, size), dtype=torch.int32)
    run = place / "large"
    checkpoint.begin_run(run, PretrainConfig(), {})
    ours, plain, bytes_ = [], [], 0
    for number in range(runs + 1):
        start = time.perf_counter()
        folder = checkpoint.save(
            run,
            number,
            encoder=encoder,
            optimizer=optimizer,
            bank=bank,
            clusters={"labels": labels},
            progress={},
        )
        ours.append(time.perf_counter() - start)
        bytes_ = sum(file.stat().st_size for file in folder.iterdir())
        plain.append(written(place / "plain", bytes_))
    rows = f"{bytes_ / 1e6:,.0f}"
    return [
        [f"ResNet-18, {size:,} rows, 10 clusterings", rows, median(ours), slowest(ours)],
        ["the same bytes, written and flushed", rows, median(plain), slowest(plain)],
    ]


def written(path: Path, size: int) -> float:
    """Seconds for plain zeros."""
    block = memoryview(bytes(1 << 24))
    start = time.perf_counter()
    with open(path, "wb", buffering=0) as file:
        for left in range(size, 0, -len(block)):
            file.write(block[:left])
        os.fsync(file.fileno())
    spent = time.perf_counter() - start
    path.unlink()
    return spent


def median(seconds: list[float]) -> str:
    return f"{statistics.median(seconds[1:]):.2f} (median of {len(seconds) - 1})"


def slowest(seconds: list[float]) -> str:
    return f"slowest {max(seconds):.2f} s, the first included"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="CIFAR-10; without it the recipe is left out")
    parser.add_argument("--epochs", type=int, default=4, help="of the recipe's run, the last LA")
    parser.add_argument("--rows", type=int, default=1_280_000, help="of the large bank")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--place", type=Path, default=Path("."), help="a folder of the disk to try")
    options = parser.parse_args()
    place = Path(tempfile.mkdtemp(dir=options.place))
    try:
        rows = [of_recipe(options.data, place, options.epochs)] if options.data else []
        rows += of_bank(place, options.rows, options.runs)
    finally:
        shutil.rmtree(place)
    report.write(
        "checkpoint",
        "What checkpoints cost",
        ["checkpoint", "MB", "seconds each", ""],
        rows,
        f"On the disk of '{options.place}', files and folders flushed. Steps are all that a run"
        " does but measuring, health and checkpoints.",
    )


if __name__ == "__main__":
    main()
