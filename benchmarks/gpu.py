"""``make gpu``: the tests that need a GPU, then every GPU benchmark, within nine minutes.

Needs no network: runs with this Python and its packages, the source tree first. Each part has a
time limit; ``results/gpu.md`` is written again after each, so that what ends early leaves the rest.
Output goes to ``build/gpu/PART.log``.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

import report

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "gpu"
SECONDS = 540.0  # of all parts together
_GRACE = 5.0  # seconds between SIGTERM and SIGKILL


class Part(NamedTuple):
    """One command of the list, and the seconds after which it is ended."""

    name: str
    words: list[str]
    limit: float


class Outcome(NamedTuple):
    """How a part ended, after how many seconds, and its last line of output."""

    name: str
    ended: str
    seconds: float
    last: str


def parts() -> list[Part]:
    """Return the parts in the order of their value."""
    script = [sys.executable]
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    # Only these files: others import packages that a GPU machine may lack.
    marked = [str(file.relative_to(ROOT)) for file in files if "mark.cuda" in file.read_text()]
    pytest = [*script, "-m", "pytest", "-q", "-m", "cuda", "--continue-on-collection-errors"]
    return [
        Part("tests", [*pytest, *marked], 210),
        Part("neighbors", [*script, "benchmarks/gpu_neighbors.py"], 120),
        Part("clustering", [*script, "benchmarks/gpu_training.py", "clustering"], 100),
        Part("step", [*script, "benchmarks/gpu_training.py", "step"], 60),
        Part("features", [*script, "benchmarks/gpu_training.py", "features"], 50),
    ]


def run_parts(
    found: Sequence[Part], seconds: float, after_each: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Run parts in their order; none begins after ``seconds``, and each ends by then.

    Args:
        found: the parts.
        seconds: limit of all together.
        after_each: called with the outcomes so far.
    """
    outcomes: list[Outcome] = []
    end = time.monotonic() + seconds
    for part in found:
        limit = min(part.limit, end - time.monotonic())
        outcomes.append(_run(part, limit) if limit > 0 else Outcome(part.name, "no time", 0.0, ""))
        after_each(outcomes)
    return outcomes


def _run(part: Part, limit: float) -> Outcome:
    LOGS.mkdir(parents=True, exist_ok=True)
    log = LOGS / f"{part.name}.log"
    before = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([str(ROOT / "src"), *([before] if before else [])])
    environment = os.environ | {"PYTHONPATH": path}
    started = time.monotonic()
    with open(log, "w") as file:
        process = subprocess.Popen(
            part.words,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its workers end with it
        )
        try:
            status = process.wait(limit)
            ended = "passed" if status == 0 else f"failed with status {status}"
        except subprocess.TimeoutExpired:
            ended = f"ended after {limit:.0f} s"
        finally:
            _end(process)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(part.name, ended, time.monotonic() - started, lines[-1] if lines else "")


def _end(process: subprocess.Popen) -> None:
    """End the session of a part, with processes that it has left."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if number == signal.SIGTERM:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                continue
    process.wait()


def write(outcomes: list[Outcome]) -> None:
    """Write the table of all parts so far."""
    rows = [
        [each.name, each.ended, f"{each.seconds:.0f}", each.last[:80].replace("|", "/")]
        for each in outcomes
    ]
    columns = ["part", "ended", "seconds", "last line of its output"]
    report.write("gpu", "Tests and benchmarks on a GPU", columns, rows)


def main() -> int:
    """Run all parts; return 0 if all passed, 1 if one did not, 2 without a GPU."""
    if not torch.cuda.is_available():
        print("make gpu: torch finds no NVIDIA GPU on this machine; nothing was run.")
        return 2
    outcomes = run_parts(parts(), SECONDS, write)
    return 0 if all(each.ended == "passed" for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
