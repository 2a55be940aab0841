"""Seconds from the command to the first training step: ``localagg pretrain folder | adapt``.

    python benchmarks/startup.py --data PHOTOS --weights FILE [--empty-cache]

Runs each command in a process of its own, which ends after the first step (of ``adapt``: after the
first features, on which its steps learn later). ``--empty-cache`` adds a run without compiled
loops, as after an installation. ``--source`` names another tree's ``src``, to compare with.
"""

import argparse
import importlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PARTS = {
    "imports": ("localagg.training.runs", "check_logger"),  # the first call after them
    "measuring speed": ("localagg.training.runs", "fit_budget"),
    "network": ("localagg.training.runs", "Learner"),
    "reading headers": ("localagg.training.runs", "open_feed"),
    "first bank, features": ("localagg.training.runs", "set_first_state"),
    "compiled loops": ("localagg.engine.search", "load_cpu_backend"),
    "floors": ("localagg.training.loop", "RunFloors.measure_start"),
    "first features": ("localagg.training.frozen.frozen_features", "_extract"),
    "first step": ("localagg.training.loop", "take_step"),
}


def child(started: float, words: list[str]) -> None:
    """Run a command up to its first step; print {part: [begin, end, CPU seconds]} as JSON."""
    found: dict[str, list[float]] = {}

    def now() -> float:
        return time.time() - started

    def watch(part: str, module: str, path: str) -> None:
        *owner, name = path.split(".")
        holder = importlib.import_module(module)
        for each in owner:
            holder = getattr(holder, each)
        function = getattr(holder, name)

        def timed(*args, **kwargs):
            begin, used = now(), time.process_time()
            result = function(*args, **kwargs)
            if part == "first features":
                next(result)
            if part not in found:
                if part == "imports":  # from the start of the process
                    begin = used = 0.0
                found[part] = [begin, now(), time.process_time() - used]
            if part in ("first features", "first step"):
                print(json.dumps(found), flush=True)
                os._exit(0)
            return result

        setattr(holder, name, timed)

    from localagg.cli import pretrain as command
    from localagg.cli.main import main

    start = command._start

    def begin(options):
        for part, (module, path) in PARTS.items():
            watch(part, module, path)
        return start(options)

    command._start = begin
    sys.exit(main(words))


def measure(words: list[str], source: str, loops: str | None = None) -> dict[str, float]:
    """Return the seconds of the parts of one run, and when messages and the first step came."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PYTHONPATH": source}
        if loops is not None:
            environment["NUMBA_CACHE_DIR"] = loops
        cache = ["--cache", f"{folder}/cache"] if words[1] == "adapt" else []
        command = [sys.executable, __file__, "--child", str(time.time()), *words]
        command += ["--out", f"{folder}/run", *cache]
        begin = time.time()
        command[3] = str(begin)
        process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stderr is not None
        said = [(time.time() - begin, line) for line in process.stderr]
        out = process.stdout.read()
    if process.wait() or not out:
        raise SystemExit("".join(line for _, line in said))
    found = json.loads(out)
    seconds = {"first word": said[0][0]}
    end = max(each[1] for each in found.values())
    times = [0.0, *(at for at, _ in said), end]
    seconds["longest silence"] = max(b - a for a, b in itertools.pairwise(times))
    for part, (begin, stop, used) in found.items():
        seconds |= {part: stop - begin, f"{part}, CPU": used}
    return seconds | {"first step, features at": end}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--source", action="append", metavar="NAME=SRC")
    parser.add_argument("--empty-cache", action="store_true")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--recipes", nargs="+", default=["folder", "adapt"])
    options = parser.parse_args()
    from report import write

    own = str(Path(__file__).parents[1] / "src")
    sources = dict(each.split("=", 1) for each in options.source or [f"now={own}"])
    timm = ["--model", "timm:tf_efficientnet_lite0", "--weights", options.weights]
    recipes = {"folder": [], "adapt": [*timm, "--image-size", "64"]}
    columns: dict[str, dict[str, float]] = {}
    for name, source in sources.items():
        for recipe in options.recipes:
            words = ["pretrain", recipe, "--data", options.data, *recipes[recipe]]
            runs = [measure(words, source) for _ in range(options.runs + 1)][1:]
            columns[f"{recipe}, {name}"] = {
                part: statistics.median(run[part] for run in runs) for part in runs[0]
            }
        if options.empty_cache:
            words = ["pretrain", "folder", "--data", options.data]
            with tempfile.TemporaryDirectory() as loops:
                columns[f"folder, {name}, not compiled yet"] = measure(words, source, loops)
    parts = ["first word", "longest silence", *PARTS, "first step, features at"]

    def cell(found: dict[str, float], part: str) -> str:
        used = f" ({found[f'{part}, CPU']:.1f})" if f"{part}, CPU" in found else ""
        return f"{found[part]:.1f}{used}" if part in found else ""

    rows = [[part, *(cell(column, part) for column in columns.values())] for part in parts]
    note = (
        f"Seconds, medians of {options.runs} runs with warm caches; in brackets CPU seconds of the"
        " main process, which other jobs on the machine disturb less. The compiled loops are loaded"
        f" within another part. Load of the machine at the end: {os.getloadavg()[0]:.0f}."
    )
    write("startup", "From the command to the first step", ["", *columns], rows, note)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
