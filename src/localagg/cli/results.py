"""``localagg results``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import printable
from .parse import positional


@dataclass(frozen=True)
class Results:
    """Compare the results of runs, beside the published numbers of the same protocol."""

    runs: tuple[str, ...] = positional("RUN")
    """Run folders or weights files."""


def run(options: Results) -> dict[str, Any]:
    """Print the tables."""
    from ..evaluation.results.results_table import compare, tables
    from ..io.console import notify, print_table

    result = compare([Path(run) for run in options.runs])
    for title, columns, rows in tables(result):
        print(printable(title))
        print_table(columns, rows)
    for note in result["notes"]:
        notify(note)
    return result
