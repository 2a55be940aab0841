"""Many runs of one recipe, several seeds each, in turn: what helps, beyond its noise?

    python benchmarks/sweep.py cifar10 --data CIFAR10 --out sweeps/switch --seeds 0 1 2 \\
        "IR alone: --ir-epochs 44" "LA from 34: --ir-epochs 34" "LA from 24: --ir-epochs 24"

Every configuration is a name and the options of ``localagg pretrain`` that it changes. Stop it
whenever you like: started again it goes on with the run it was in, and finished runs are not run
again. Seeds are the outer loop, so that a sweep that is stopped has compared like with like.
"{seed}" in options stands for the seed, as in ``--start sweeps/ir-{seed}``.
Writes ``results.parquet`` (a line a run and measurement), ``curves.html`` and a table.
"""

import argparse
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

import report
from localagg.checkpoint import latest, read_progress
from localagg.errors import UserError
from localagg.io.metrics_log import read_metrics
from localagg.report.charts import draw_curves
from localagg.report.page import table, write_page

METRICS = ("knn1", "knn200", "nmi", "cluster_accuracy")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe")
    parser.add_argument("configurations", nargs="+", metavar="'NAME: OPTIONS'")
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--budget",
        type=float,
        help="minutes after which no run is begun; 0: the table of what there is",
    )
    arguments = parser.parse_args()
    named = dict(_configuration(text) for text in arguments.configurations)
    budget = float("inf") if arguments.budget is None else arguments.budget
    end = time.monotonic() + 60 * budget
    for seed in arguments.seeds:
        for name, options in named.items():
            if time.monotonic() < end:
                words = [arguments.recipe, "--data", arguments.data, "--seed", str(seed)]
                words += [option.format(seed=seed) for option in options]
                _run(_place(arguments.out, name, seed), words)
    lines = [line for name in named for line in _measured(arguments.out, name, arguments.seeds)]
    if not lines:
        raise SystemExit("No run has been measured yet.")
    arguments.out.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(lines), arguments.out / "results.parquet")
    _plot(lines, arguments.out / "curves.html")
    _table(arguments, named, lines)


def _configuration(text: str) -> tuple[str, list[str]]:
    name, colon, options = text.partition(":")
    if not colon:
        raise SystemExit(f"'{text}' is no configuration; write 'NAME: OPTIONS'.")
    return name.strip(), shlex.split(options)


def _place(out: Path, name: str, seed: int) -> Path:
    return out / f"{name}-{seed}".replace(" ", "-").replace("/", "-")


def _run(run: Path, words: list[str]) -> None:
    """Begin a run or go on with it, in a process of its own; nothing if it is finished."""
    if _summary(run) is not None:
        return
    command = [sys.executable, "-m", "localagg", "pretrain"]
    begun = (run / "checkpoints").exists()
    command += ["--resume", str(run)] if begun else [*words, "--out", str(run)]
    print(shlex.join(command[2:]), file=sys.stderr)
    done = subprocess.run(command, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def _summary(run: Path) -> dict[str, Any] | None:
    try:
        return read_progress(latest(run))["summary"]
    except UserError:
        return None


def _measured(out: Path, name: str, seeds: list[int]) -> list[dict[str, Any]]:
    """A line for each measurement of the finished runs of a configuration."""
    lines = []
    for seed in seeds:
        run = _place(out, name, seed)
        summary = _summary(run)
        if summary is None:
            continue
        for line in read_metrics(run):
            found = {metric: line[metric] for metric in METRICS if metric in line}
            about = {"name": name, "seed": seed, "epoch": line["epoch"]}
            last = {"minutes": report.minutes(run), "last": line["epoch"] == summary["epochs"]}
            lines += [about | found | last] if found else []
    return lines


def _plot(lines: list[dict[str, Any]], path: Path) -> None:
    """200-NN (or the first metric there is) by epoch, a line a run."""
    metric = next(metric for metric in ("knn200", *METRICS) if metric in lines[0])
    curves: dict[str, list[tuple[float, float]]] = {}
    for line in lines:
        curves.setdefault(f"{line['name']}, seed {line['seed']}", [])
        curves[f"{line['name']}, seed {line['seed']}"].append((line["epoch"], line[metric]))
    legend = table(
        ["", f"{metric} at the end"], [[n, f"{c[-1][1]:.3f}"] for n, c in curves.items()]
    )
    write_page(path, title=f"{metric} by epoch", head=draw_curves(curves) + legend, data={})


def _table(
    arguments: argparse.Namespace, named: dict[str, list[str]], lines: list[dict[str, Any]]
) -> None:
    there = [metric for metric in METRICS if any(metric in line for line in lines)]
    rows = []
    for name, options in named.items():
        last = [line for line in lines if line["name"] == name and line["last"]]
        if not last:
            continue
        cells = [report.percent([line[metric] for line in last]) for metric in there]
        minutes = statistics.mean(line["minutes"] for line in last)
        rows.append([name, f"`{shlex.join(options)}`", len(last), f"{minutes:.1f}", *cells])
    report.write(
        f"sweep-{arguments.out.name}",
        f"{arguments.recipe}: {arguments.out.name}",
        ["", "options", "seeds", "minutes", *(f"{metric}, %" for metric in there)],
        rows,
        "Mean and 95 % interval (Student's t) over seeds, at the end of each run. Minutes are with"
        " those of the run that a run began from.",
    )


if __name__ == "__main__":
    main()
