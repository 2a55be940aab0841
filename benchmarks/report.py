"""How every benchmark tells its result: one table, with the machine, the versions and the date."""

import datetime
import os
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """The processor, its cores, and the GPU if there is one."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        name = next((line.split(": ")[1] for line in lines if "model name" in line), name)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{name}, {os.cpu_count()} cores{gpu}"


def interleaved(calls: dict[str, Callable[[], object]], runs: int = 7) -> dict[str, float]:
    """Median seconds of each call, the calls taking turns in this one process."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(runs + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if run:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in times.items()}


def minutes(run: Path) -> float:
    """What a finished run has taken, with what it began from."""
    from localagg.checkpoint import latest, read_progress, read_run

    spent = read_progress(latest(run))["summary"]["seconds"] / 60
    start = read_run(run)[1].get("start")
    return spent + (minutes(Path(start)) if start else 0.0)


def percent(values: Sequence[float]) -> str:
    """The mean of shares in percent, with its 95 % interval (Student's t) where it has one."""
    from localagg.evaluation.readouts.low_shot import half_width

    half = half_width(values)
    spread = "" if half is None else f" ± {100 * half:.1f}"
    return f"{100 * statistics.mean(values):.1f}{spread}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # faiss-gpu, or a conda package without metadata
        return "of unknown version"


def write(
    name: str, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = ""
) -> None:
    """Print a table and keep it as ``results/NAME.md``."""
    packages = ("torch", "torchvision", "lightning", "faiss-cpu", "numpy")
    versions = ", ".join(f"{package} {_version(package)}" for package in packages)
    own_folders = re.compile(r"(?<![\w.~])/(?:[^\s/=:]+/)+")
    given = [own_folders.sub("", word) for word in sys.argv[1:]]
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *given])
    table = [columns, ["---"] * len(columns), *rows]
    lines = [
        f"# {title}",
        "",
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in table),
        "",
        *([note, ""] if note else []),
        f"`{command}`, {datetime.date.today()}. {machine()}; Python {platform.python_version()},"
        f" {versions}.",
        "",
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text("\n".join(lines))
    print("\n".join(lines))
