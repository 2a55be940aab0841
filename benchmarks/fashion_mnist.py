"""Fashion-MNIST (Xiao, Rasul & Vollgraf 2017) as Parquet, from its four idx files.

    python benchmarks/fashion_mnist.py /usr/share/datasets/fashion-mnist fashion-mnist

The folder is that of Debian's package dataset-fashion-mnist, or of the data set's own page. Each
image is stored as a PNG, as it would be in a data set of the Hub.
"""

import argparse
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of the idx files")
    parser.add_argument("out", type=Path, help="folder to make")
    parser.add_argument("--first", type=int, default=60_000, help="training images to take")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, prefix in {"train": "train", "test": "t10k"}.items():
        images = _idx(options.source / f"{prefix}-images-idx3-ubyte.gz")
        labels = _idx(options.source / f"{prefix}-labels-idx1-ubyte.gz")
        count = options.first if split == "train" else len(images)
        table = _table(images[:count], labels[:count])
        pq.write_table(table, options.out / f"{split}.parquet")
        print(f"{len(table):,} images in {options.out / split}.parquet")


def _idx(path: Path) -> np.ndarray:
    """An idx file: two zeros, the type (8: uint8), how many sizes, the sizes, the data."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\0\0\x08":
        raise SystemExit(f"'{path}' is no idx file of bytes.")
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def _table(images: np.ndarray, labels: np.ndarray) -> pa.Table:
    rows = [{"image": {"bytes": _png(image), "path": None}} for image in images]
    return pa.Table.from_pylist(rows).append_column("label", pa.array(labels, pa.int64()))


def _png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG")
    return stream.getvalue()


if __name__ == "__main__":
    main()
