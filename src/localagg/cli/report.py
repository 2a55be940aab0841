"""``localagg report``."""

from dataclasses import dataclass
from typing import Any

from .parse import positional


@dataclass(frozen=True)
class Report:
    """Write one HTML page of a run: results, map, clusters, duplicates, odd images, curves.

    It opens in any browser, offline. For several runs, results and curves are compared.
    """

    runs: tuple[str, ...] = positional("RUN")
    """Run folders, or tables written by embed."""
    out: str | None = None
    """HTML file to write. Default: report.html in the run, or FILE.html beside FILE.parquet."""
    workers: int = 2
    """Number of decoding processes."""


def run(options: Report) -> dict[str, Any]:
    """Write the page and print its path."""
    from ..report.run_report import write_report

    result = write_report(options.runs, options.out, workers=options.workers)
    size = result["bytes"] / 1e6
    print(f"{result['images']:,} images, {size:.1f} MB, {result['seconds']:.0f} s.")
    print(f"Open {result['out']}")
    return result
