"""``localagg demo``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Demo:
    """Learn the built-in digits by IR and then LA, and compare with computed floors.

    Prints a table and writes results.json and report.html.
    """

    out: str = "runs/demo"
    """Folder to write. An earlier demo in it is replaced."""
    seed: int = 0
    """Random seed of both runs."""


def run(options: Demo) -> dict[str, Any]:
    """Run the demo and print its table."""
    from ..io.console import print_table
    from ..report.digits_demo import demo

    result = demo(Path(options.out), seed=options.seed)
    columns = {"knn1": "1-NN", "nmi": "NMI", "cluster_accuracy": "cluster accuracy"}
    rows = [[row["name"], *(f"{row[column]:.3f}" for column in columns)] for row in result["rows"]]
    print_table(["", *columns.values()], rows)
    print(f"{result['seconds']['total']:.0f} s. Open {Path(options.out) / 'report.html'}")
    return result
