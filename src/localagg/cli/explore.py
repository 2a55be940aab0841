"""``localagg explore``."""

from dataclasses import dataclass

from .parse import positional


@dataclass(frozen=True)
class Explore:
    """Show a run or table in the browser: map of all images, neighbors, search, labels.

    A server on this machine alone serves the page until Ctrl-C.
    """

    place: str = positional("RUN|FILE.parquet")
    """Run folder, or table written by embed."""
    port: int = 0
    """TCP port, 0 to 65,535. Default: any free one."""
    workers: int = 2
    """Number of decoding processes."""


def run(options: Explore) -> None:
    """Serve the page until Ctrl-C."""
    from ..report.explorer.server import explore

    explore(options.place, port=options.port, workers=options.workers)
