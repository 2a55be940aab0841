"""Does ``localagg inspect`` look through 50,000 files in half a minute, telling of it at once?

The command runs as a user runs it, on a terminal, on small JPEG files made here from photographs
(64 x 64 pixels in 100 class folders). Told are the seconds from its start until something is seen,
until files are counted, and until its end, with the timing of an epoch left out and put in.
"""

import argparse
import os
import pty
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

import report

SIDE = 64
COMMAND = [sys.executable, "-m", "localagg", "inspect"]


def make(root: Path, count: int) -> int:
    """Write the files; returns their bytes."""
    photos, draws, total = load_sample_images().images, np.random.RandomState(0), 0
    for i in range(count):
        photo = photos[i % 2]
        top, left = draws.randint(0, 427 - SIDE), draws.randint(0, 640 - SIDE)
        path = root / f"class-{i % 100:02d}" / f"{i:07d}.jpg"
        path.parent.mkdir(exist_ok=True)
        crop = photo[top : top + SIDE, left : left + SIDE]
        Image.fromarray(crop).save(path, quality=75 + i % 20)
        total += path.stat().st_size
    return total


def watch(words: list[str], files: int) -> tuple[float, float, float]:
    """Seconds until something is seen, until files are counted, and until the end."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    started = time.perf_counter()
    child = subprocess.Popen(
        [*COMMAND, *words], stdout=subprocess.DEVNULL, stderr=theirs, env=environment
    )
    os.close(theirs)
    seen = counted = 0.0
    shown = b""
    while child.poll() is None:
        if not select.select([ours], [], [], 0.05)[0]:
            continue
        try:
            shown += os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        now = time.perf_counter() - started
        seen = seen or now
        counted = counted or now * (f"/{files:,}".encode() in shown)  # of the progress
    child.wait()
    ended = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(shown.decode(errors="replace"))
    os.close(ours)
    return seen, counted, ended


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=50_000)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    ways = {
        "header and end of each": ["--recipe", "none"],
        "every image decoded": ["--recipe", "none", "--decode"],
        "headers, and an epoch of folder timed": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        size = make(Path(folder), options.files)
        times = {name: [] for name in ways}
        for _ in range(options.runs):
            for name, words in ways.items():
                times[name].append(watch([folder, *words], options.files))
    rows = [
        [name, *(f"{statistics.median(values):.1f} s" for values in zip(*found, strict=True))]
        for name, found in times.items()
    ]
    report.write(
        "inspect_folder",
        f"localagg inspect on {options.files:,} JPEG files",
        ["what is done", "something is seen", "files are counted", "end"],
        rows,
        f"{size / 1e6:,.0f} MB, {SIDE} x {SIDE} pixels each, in the page cache. Medians of"
        f" {options.runs} interleaved runs of the whole command, the start of Python included.",
    )


if __name__ == "__main__":
    main()
