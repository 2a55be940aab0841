"""What fuzz.py damages: a small valid input of each foreign format, and its reader.

Valid input is made by the writers of the tests; what a reader makes of it is compared with what an
independent reader does where the format has no checksums.
"""

import gzip
import struct
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))  # writers of valid input

Files = dict[str, bytes]
Part = tuple[Sequence[bytes], Callable[[Sequence[bytes]], Files]]


class Target(NamedTuple):
    """What is fuzzed."""

    files: Files
    """A small valid input: file name -> content."""
    read: Callable[[Path], Any]
    """All that the reader makes of a folder of such files; compared with ``==``."""
    sealed: Sequence[Part] = ()
    """(parts, build): ``build(parts)`` makes files with right checksums, whatever the parts are."""
    checked: bool = True
    """Whether the format has checksums over everything."""


def tf_checkpoint() -> Target:
    """A TensorFlow checkpoint of all data types, several blocks and two data files."""
    import make_tf_checkpoint as make

    pairs, data = make.bundle(_variables(), shards=2)
    flat = [piece for pair in pairs for piece in pair]
    blocks = [pairs[i : i + 5] for i in range(0, len(pairs), 5)]
    lasts, contents = [b[-1][0] for b in blocks], [make.block(b) for b in blocks]
    files = make.files(pairs, data)

    def with_pairs(parts: Sequence[bytes]) -> Files:
        return make.files(list(zip(parts[::2], parts[1::2], strict=True)), data)

    def with_blocks(parts: Sequence[bytes]) -> Files:
        return with_table(make.table_parts(list(zip(lasts, parts, strict=True))))

    def with_table(parts: Sequence[bytes]) -> Files:
        return {**files, "model.ckpt-10.index": make.joined(*parts)}

    table = make.table_parts(list(zip(lasts, contents, strict=True)))
    sealed = ((flat, with_pairs), (contents, with_blocks), (table, with_table))
    return Target(files, _read_checkpoint("model.ckpt-10"), sealed)


def tf_checkpoint_tar() -> Target:
    """The same in a tar."""
    return _archive("")


def tf_checkpoint_tar_gz() -> Target:
    """The same in a compressed tar."""
    return _archive("gz")


def _archive(compression: str) -> Target:
    import make_tf_checkpoint as make

    members = {f"run/{name}": data for name, data in tf_checkpoint().files.items()}
    members["run/checkpoint"] = b'model_checkpoint_path: "/old/model.ckpt-10"\n'
    packed = make.archive(members)

    def compressed(parts: Sequence[bytes]) -> Files:
        return {"c.tar": gzip.compress(parts[0], compresslevel=1)}

    sealed = (([packed], compressed),) if compression else ()
    files = {"c.tar": make.archive(members, compression)}
    return Target(files, _read_checkpoint("c.tar"), sealed)


def _variables() -> dict[str, Any]:
    import make_tf_checkpoint as make

    draws = np.random.RandomState(0)
    variables: dict[str, Any] = {
        f"network/layer_{i}/{part}": draws.randn(3, 2).astype("float32")
        for i in range(6)
        for part in ("kernel", "kernel/Momentum")
    }
    for dtype in make.DTYPES:
        variables[f"types/{dtype}"] = (draws.rand(2, 3) * 100).astype(dtype)
    variables["types/bfloat16"] = make.Raw(make.BFLOAT16, (3,), draws.bytes(6))
    variables["types/text"] = make.Raw(make.STRING, (1,), b"\x03\0\0\0\0abc")
    variables["shape/none"] = np.zeros((0, 4), "float32")
    variables["global_step"] = np.int64(10).reshape(())
    return variables


def _read_checkpoint(name: str) -> Callable[[Path], Any]:
    from localagg.interop.tf_checkpoint import open_tf_checkpoint

    def read(folder: Path) -> Any:
        with open_tf_checkpoint(folder / name) as checkpoint:
            numbers = [n for n in checkpoint.names if checkpoint.dtype(n).kind != "O"]
            arrays = {n: checkpoint.read(n) for n in numbers}
            shapes = {n: checkpoint.shape(n) for n in checkpoint.names}
        return shapes, {n: (str(a.dtype), a.shape, a.tobytes()) for n, a in arrays.items()}

    return read


def tfrecords() -> Target:
    """Six images in two TFRecord files; sealed inside a record, or around a wrong length."""
    import make_tfrecords as make

    payloads = make.payloads()
    counts = {name: len(records) for name, records in payloads.items()}
    flat = [record for records in payloads.values() for record in records]

    def split(parts: Sequence[bytes]) -> dict[str, list[bytes]]:
        rest = iter(parts)
        return {name: [next(rest) for _ in range(count)] for name, count in counts.items()}

    def with_records(parts: Sequence[bytes]) -> Files:
        return {name: make.framed(*records) for name, records in split(parts).items()}

    def with_lengths(parts: Sequence[bytes]) -> Files:
        return {
            name: b"".join(map(make.record, records, payloads[name]))
            for name, records in split(parts).items()
        }

    lengths = [struct.pack("<Q", len(record)) for record in flat]
    sealed = ((flat, with_records), (lengths, with_lengths))
    return Target(with_records(flat), _read_tfrecords, sealed)


def _read_tfrecords(folder: Path) -> Any:
    import make_tfrecords as make

    from localagg.data import open_images

    source = open_images(folder)
    found = {i: (source[i].image, source[i].label) for i in range(len(source))}
    # Whatever is accepted must be what Google's protobuf reads in the same records.
    assert found == make.by_index(folder, labeled=source.labels is not None)
    return found


def tars() -> Target:
    """Five images in two WebDataset tars; sealed inside a header."""
    import make_tars as make

    parts = make.parts()
    flat = [header for headers in parts.values() for header, _ in headers]

    def with_headers(headers: Sequence[bytes]) -> Files:
        rest = iter(headers)
        return {
            name: make.joined([(make.sealed(next(rest)), data) for _, data in old])
            for name, old in parts.items()
        }

    return Target(with_headers(flat), _read_tars, ((flat, with_headers),), checked=False)


def _read_tars(folder: Path) -> Any:
    import make_tars as make

    from localagg.data import open_images

    source = open_images(folder)
    found = [(source[i].image, source[i].label) for i in range(len(source))]
    words = [(source.classes or [])[n] if n is not None and n >= 0 else None for _, n in found]
    # Whatever is accepted must be what Python's tarfile finds.
    due = make.by_tarfile(folder)
    assert [image for image, _ in found] == [image for image, _ in due]
    assert set(words) == {None} or words == [word for _, word in due]
    return found


def saved_dataset() -> Target:
    """Six images in a folder of ``datasets``: Arrow, which has no checksums at all."""
    import datasets

    draws = np.random.RandomState(0)
    images = [{"bytes": draws.bytes(size), "path": None} for size in (40, 300, 0, 7, 130, 90)]
    columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])}
    features = datasets.Features(columns)
    rows = {"image": images, "label": [2, 0, 1, 2, 1, 0]}
    with tempfile.TemporaryDirectory() as folder:
        datasets.disable_progress_bars()
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    return Target(files, _read_saved, checked=False)


def _read_saved(folder: Path) -> Any:
    import pyarrow as pa

    from localagg.data import open_images

    source = open_images(folder)
    found = [(source[i].image, source[i].label) for i in range(len(source))]
    (name,) = [path for path in folder.iterdir() if path.suffix == ".arrow"]
    with pa.memory_map(str(name)) as file:
        table = pa.ipc.open_stream(file).read_all()
    kind = table.schema.types[0]
    if pa.types.is_struct(kind) and table.column(0).null_count == 0:
        due = [(image or {}).get("bytes") or b"" for image in table.column(0).to_pylist()]
        assert [image for image, _ in found] == due
    return found


TARGETS: dict[str, Callable[[], Target]] = {
    target.__name__: target
    for target in (
        tf_checkpoint,
        tf_checkpoint_tar,
        tf_checkpoint_tar_gz,
        tfrecords,
        tars,
        saved_dataset,
    )
}
