"""Is the newer of two source trees slower? Their own benchmarks, in turn.

    python benchmarks/two_trees.py OLD NEW "ms=neighbors --sizes 50000 --largest 0" "s=knn"

Each item is a column of the table that a benchmark writes, and its command. Lines of that table
are compared that stand in both, by their cells before the column.
"""

import argparse
import os
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

import report

Line = tuple[str, ...]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("items", nargs="+", metavar="COLUMN=COMMAND")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    rows = []
    for item in options.items:
        column, command = item.split("=", 1)
        times: list[dict[Line, list[float]]] = [{}, {}]
        for turn in range(options.turns):
            both = [*enumerate((options.old, options.new))]
            for number, tree in both if turn % 2 else reversed(both):
                for line, value in measure(tree, column, command).items():
                    times[number].setdefault(line, []).append(value)
        rows += compare(command.split()[0], *times)
    report.write(
        "two_trees",
        "The benchmarks of two trees",
        ["benchmark", "line", "before", "now", "ratio"],
        rows,
        f"Medians of {options.turns} turns; the ratio is now by before, so below 1 is faster. In"
        " brackets: the smallest and largest of its turns.",
    )


def measure(tree: Path, column: str, command: str) -> dict[Line, float]:
    """Run a tree's benchmark; return the column's numbers by the cells before it."""
    name, *words = shlex.split(command)
    environment = {**os.environ, "PYTHONPATH": str(tree.resolve() / "src")}
    script = [sys.executable, f"benchmarks/{name}.py", *words]
    subprocess.run(script, cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
    written = (tree / "benchmarks" / "results" / f"{name}.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in written if line.startswith("|")]  # fmt: skip
    at = next(header.index(column) for header in table if column in header)
    found = {}
    for cells in table:
        number = re.match(r"[\d.,]+", cells[at]) if len(cells) > at else None
        if number:
            found[tuple(cells[:at])] = float(number[0].replace(",", ""))
    return found


def compare(
    name: str, before: dict[Line, list[float]], now: dict[Line, list[float]]
) -> list[list[str]]:
    rows = []
    for line in before:
        if line in now:
            ratios = [b / a for a, b in zip(before[line], now[line], strict=True)]
            spread = f"({min(ratios):.2f} to {max(ratios):.2f})"
            medians = [statistics.median(each[line]) for each in (before, now)]
            rows.append([name, " ".join(line), *(f"{each:g}" for each in medians),
                         f"{statistics.median(ratios):.2f} {spread}"])  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
