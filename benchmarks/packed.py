"""Is packed reading as fast as reading files, and are a million records open in two seconds?

Reading: encoded bytes by random index, from the page cache, in one process, the ways taking turns.
Opening: each in a fresh process, after its imports; the records are one small PNG under a million
labels. The first opening of tars and TFRecords reads them once, which pack does at its end.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import report
from localagg.data import Sample, open_images
from localagg.data.pack.formats import FORMATS
from localagg.data.pack.pack_dataset import pack
from localagg.data.sources.source import ImageRecord, encoded_bytes

SHARED = Path(__file__).parents[2] / "shared" / "data"
FILES = 8  # of the synthetic records


# --- Reading ---


def as_files(uri: str, folder: Path, most: int) -> None:
    """The first images of a source as files in class folders."""
    source = open_images(uri)
    for i in range(min(most, len(source))):
        place = folder / str(source[i].label)
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i:06d}.png").write_bytes(encoded_bytes(source[i].image))


class ByDatasets:
    """The packed Arrow as ``datasets`` reads it."""

    def __init__(self, folder: Path) -> None:
        import datasets

        loaded = datasets.load_from_disk(str(folder))["train"]
        self.data = loaded.cast_column("image", datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> bytes:
        return self.data[index]["image"]["bytes"]


def reading(uri: str, folder: Path, runs: int) -> list[list[str]]:
    """Rows of the table: ways of reading one set of images."""
    sources = {"files in folders": open_images(uri)}
    for format in FORMATS:
        pack(uri, folder / format, format=format)
        sources[f"pack --format {format}"] = open_images(folder / format)
    sources["the same Arrow by datasets"] = ByDatasets(folder / "arrow")
    count = len(sources["files in folders"])
    order = np.random.RandomState(0).permutation(count).tolist()
    order *= max(1, 2000 // count)

    def read(source) -> None:
        for i in order:
            source[i]

    seconds = report.interleaved({n: lambda s=s: read(s) for n, s in sources.items()}, runs)
    base = seconds["files in folders"]
    return [
        [
            name,
            f"{len(order) / spent:,.0f}",
            f"{spent / len(order) * 1e6:.1f}",
            f"{base / spent:.2f}",
        ]
        for name, spent in seconds.items()
    ]


# --- Opening ---


class Synthetic:
    """As many records of one tiny picture as asked for, in a thousand classes."""

    uri = "synthetic"

    def __init__(self, count: int) -> None:
        self.labels = torch.arange(count) % 1000
        self.classes = [f"class {label}" for label in range(1000)]
        self.picture = encoded_bytes(open_images("digits")[0].image)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(index, self.picture, index % 1000)

    def fingerprint(self) -> str:
        return "0" * 64


def write(source: Synthetic, format: str, folder: Path) -> None:
    kind, names = FORMATS[format], [FORMATS[format].name("train", i, FILES) for i in range(FILES)]
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        rows = kind.rows(len(source), number, FILES)
        records = (ImageRecord(i, "", source.picture, i % 1000, None, "PNG") for i in rows)
        kind.write(folder / name, records, source)
    kind.complete(folder, "train", names, source)


OPEN = """
import sys, time
from localagg.data import open_images
start = time.perf_counter()
source = open_images(sys.argv[1])
opened = time.perf_counter() - start
source[len(source) // 2]
print(len(source), opened)
"""


def opening(format: str, count: int, runs: int) -> list[str]:
    """A row of the table: seconds of opening, and of the whole process."""
    with tempfile.TemporaryDirectory() as folder:
        write(Synthetic(count), format, Path(folder))
        found = []
        for _ in range(runs + 1):
            start = time.perf_counter()
            said = subprocess.check_output([sys.executable, "-c", OPEN, folder], text=True).split()
            found.append((float(said[1]), time.perf_counter() - start))
            assert int(said[0]) == count
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    first, rest = found[0][0], np.median(found[1:], axis=0)
    return [format, f"{count:,}", f"{size / 1e6:,.0f}", f"{first:.2f}", *(f"{x:.2f}" for x in rest)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000, help="to open")
    parser.add_argument("--images", type=int, default=5000, help="of CIFAR-10, to read")
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        as_files(str(SHARED / "cifar10"), Path(folder) / "cifar10", options.images)
        sets = {
            "imagenet-samples": str(SHARED / "imagenet-samples"),
            f"CIFAR-10, {options.images:,} PNG files": f"{folder}/cifar10",
        }
        for number, (name, uri) in enumerate(sets.items()):
            rows += [[name, *row] for row in reading(uri, Path(folder) / str(number), options.runs)]
    opened = [opening(format, options.records, options.runs) for format in FORMATS]
    columns = ["format", "records", "MB", "first s", "s", "s, whole process with imports"]
    lines = [columns, ["---"] * len(columns), *opened]
    report.write(
        "packed",
        "Packed images: reading by random index, and opening",
        ["images", "read from", "images/s", "us an image", "x files"],
        rows,
        "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines),
    )


if __name__ == "__main__":
    main()
