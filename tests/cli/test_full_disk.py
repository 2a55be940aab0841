"""Every command that writes, on a disk that is full: one sentence, no partial result.

A limit on the size of files stands for the disk: the system refuses the bytes beyond it.
"""

import resource

import pytest
from small_commands import run_and_table

from localagg import cli

COMMANDS = {
    "embed parquet": "embed RUN --data digits --out OUT.parquet",
    "embed npy": "embed RUN --data digits --out OUT.npy",
    "embed h5": "embed RUN --data digits --out OUT.h5",
    "embed zarr": "embed RUN --data digits --out OUT.zarr",
    "embed csv": "embed RUN --data digits --out OUT.csv",
    "transfer": "transfer RUN --data digits --epochs 1 --out OUT --cache-gb 0 --workers 0",
    "transfer, cached": "transfer RUN --data digits --epochs 1 --out OUT --cache CACHE --workers 0",
    "transfer --quick": "transfer RUN --data digits --quick --out OUT --workers 0",
    "pack arrow": "pack digits OUT",
    "pack tfrecord": "pack digits OUT --format tfrecord",
    "pack webdataset": "pack digits OUT --format webdataset",
    "report": "report RUN --out OUT.html",
    "clusters": "clusters TABLE --k 4 --out OUT.csv",
    "clusters --html": "clusters TABLE --k 4 --html OUT.html",
    "outliers": "outliers TABLE --out OUT.csv",
    "duplicates": "duplicates TABLE --out OUT.csv",
    "compare": "compare TABLE TABLE --out OUT.csv",
    "export hub": "export RUN --to safetensors --out OUT.safetensors",
    "export onnx": "export RUN --to onnx --out OUT.onnx",
    "export pt2": "export RUN --to pt2 --out OUT.pt2",
    "knn --json": "knn RUN --json OUT.json",
    "pretrain": "pretrain digits --data digits --out OUT --epochs 1 --width 8 --blocks 1"
    " --batch-size 100 --ir-epochs 1 --device cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return run_and_table(tmp_path_factory.mktemp("made"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "room"),
    [
        pytest.param(command, room, id=f"{name}-{room}")
        for name, command in COMMANDS.items()
        for room in (1_000, 30_000)
        if room > 1_000 or name not in ("duplicates", "transfer --quick")  # they take the longest
    ],
)
def test_a_full_disk_is_one_sentence_and_leaves_no_partial_result(
    command, room, made, tmp_path, capsys
):
    run, table = made
    places = {"RUN": run, "TABLE": table, "OUT": tmp_path / "out", "CACHE": tmp_path / "cache"}
    words = []
    for word in command.split():
        stem, dot, suffix = word.partition(".")
        words.append(f"{places[stem]}{dot}{suffix}" if stem in places else word)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        status = cli.main(words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = capsys.readouterr().err.strip().splitlines()
    outs = [path for path in tmp_path.iterdir() if path.name.startswith("out")]
    if status == 0:
        assert outs
    else:
        assert status == 2, said
        assert said[-1].startswith("localagg: "), said
        assert not [path for path in outs if path.is_file()]
        assert cli.main(words) in (0, 2), "the same command goes on, or says why not"
