"""How long does the page of 5,000 and 50,000 images take, to write, to open and to pan?

Takes CIFAR-10's images or any others, and random rows around 30 centers as their embedding.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from browser import PAN, open_browser, press_key

import report
from localagg.data.sources.open import open_images
from localagg.report.embedding_page import Pictured, write_embedding_page
from localagg.report.thumbnails import SourceImages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="images; repeated if too few")
    parser.add_argument("--counts", type=int, nargs="+", default=[5000, 50_000])
    asked = parser.parse_args()
    source, rows = open_images(asked.data), []
    for count in asked.counts:
        draws = torch.Generator().manual_seed(0)
        centers = torch.randn(30, 128, generator=draws)[torch.arange(count) % 30]
        space = F.normalize(centers + 0.8 * torch.randn(count, 128, generator=draws), dim=1)
        index = [i % len(source) for i in range(count)]
        shown = Pictured(space, [source.name(i) for i in index], {}, SourceImages(source, index))
        with tempfile.TemporaryDirectory() as folder:
            file, start, busy = Path(folder) / "page.html", time.perf_counter(), _cpu_seconds()
            found = write_embedding_page(file, shown, title="benchmark")
            written, busy = time.perf_counter() - start, _cpu_seconds() - busy
            with open_browser() as page:
                ready, rate = press_key(page, file.as_uri())[1], page.evaluate(PAN)
        megabytes = found["bytes"] / 1e6
        cells = [f"{megabytes:.1f}", f"{written:.0f}", f"{busy:.0f}", f"{ready:.2f}", f"{rate:.0f}"]
        rows.append([f"{count:,}", *cells])
        print(rows[-1], flush=True)
    report.write(
        "report_page",
        "The page of a run",
        ["images", "MB", "s to write", "of processors", "s to interact", "pan, frames a s"],
        rows,
        "To write, after the embedding: neighbors, clusters, map and thumbnails; by the clock, and"
        " in seconds of all processors, which other programs change less. To interact: from"
        " opening the file to a drawn map with an image chosen by key. Frames: median of 60 while"
        " panning, Chromium without a GPU, at most 60.",
    )


def _cpu_seconds() -> float:
    """Return seconds of this process and of its ended workers."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
