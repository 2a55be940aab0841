"""TensorFlow checkpoints that are missing, altered, or made to mislead."""

import time

import fuzz
import make_tf_checkpoint as make
import pytest
from expect import user_error
from make_tf_checkpoint import SMALL, entry_of, put

from localagg.interop.tf_checkpoint import open_tf_checkpoint


def check_error(path, code, *values):
    with user_error(code, *values), fuzz.limits(), open_tf_checkpoint(path):
        pass


def test_missing_and_foreign_files_are_named(tmp_path):
    files = make.checkpoint(SMALL, 2)
    put(tmp_path, files)
    table = files["model.ckpt-10.index"]
    check_error(tmp_path / "model.ckpt-11", "not-found", "model.ckpt-11", "'model.ckpt-10'")
    check_error(tmp_path / "nowhere" / "model.ckpt", "not-found", "nowhere")
    put(tmp_path, {"notes.txt": b"text", "old-3": table})
    check_error(tmp_path / "notes.txt", "unsupported", "notes.txt")
    check_error(tmp_path / "old-3", "unsupported", "old-3", "V1")
    put(tmp_path / "v1", {"old-3": table, "checkpoint": b'model_checkpoint_path: "old-3"'})
    check_error(tmp_path / "v1", "not-found", tmp_path / "v1", "V2")
    (tmp_path / "empty").mkdir()
    check_error(tmp_path / "empty", "not-found", tmp_path / "empty")
    put(tmp_path, {"text.index": b"text", "cut.index": table[:-1], "nothing.index": b""})
    for name in ("text.index", "cut.index", "nothing.index"):
        check_error(tmp_path / name, "damaged", tmp_path / name)
    (tmp_path / "model.ckpt-10.index").unlink()
    for name in ("model.ckpt-10", "model.ckpt-10.data-00001-of-00002"):
        check_error(tmp_path / name, "not-found", "model.ckpt-10.index")


def test_altered_data_fail_when_read(tmp_path):
    put(tmp_path, make.checkpoint(SMALL))
    data = tmp_path / "model.ckpt-10.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    with open_tf_checkpoint(tmp_path) as checkpoint:
        with user_error("damaged", "a/kernel", data):
            checkpoint.read("a/kernel")
        assert checkpoint.read("b").tolist() == [1, -2]
        data.write_bytes(content[:-1])
        with user_error("damaged", "'b'", data):
            checkpoint.read("b")
        data.unlink()
        with user_error("not-found", data):
            checkpoint.read("b")
        data.mkdir()
        with user_error("environment", data):
            checkpoint.read("b")


def test_every_flipped_bit_of_an_index_is_noticed(tmp_path):
    files = make.checkpoint(SMALL)
    put(tmp_path, files)
    table = files["model.ckpt-10.index"]
    padding = range(len(table) - 48, len(table) - 8)  # has no checksum apart from the handles
    for at in set(range(len(table))) - set(padding):
        changed = bytearray(table)
        changed[at] ^= 1 << at % 8
        put(tmp_path, {"model.ckpt-10.index": bytes(changed)})
        check_error(tmp_path, "damaged", "model.ckpt-10.index")


def test_unsupported_variables_are_listed_but_not_read(tmp_path):
    text = make.Raw(make.STRING, (2,), b"\x01\x02\0\0\0\0abc")
    sliced = make.Raw(1, (10, 4), b"", more=make.message(7, make.message(1, b"")))
    strange = make.Raw(99, (2,), b"abc")
    table = {"text": text, "sliced": sliced, "strange": strange, "\0\0slice": SMALL["b"]}
    put(tmp_path, make.checkpoint({**SMALL, **table}))
    with open_tf_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ["a/kernel", "b", "sliced", "strange", "text"]
        assert checkpoint.shape("sliced") == (10, 4)
        for name, reason in (("text", "text"), ("sliced", "slices"), ("strange", "99")):
            with user_error("unsupported", f"'{name}'", reason):
                checkpoint.read(name)
        with user_error("not-found", "a/kernal", "'a/kernel'"):
            checkpoint.read("a/kernal")


HUGE = make.message(2, make.message(2, make.number(1, 1 << 61)) * 2)
MANY_AXES = make.message(2, make.message(2, b"") * (1 << 20))


@pytest.mark.parametrize(
    ("files", "problem"),
    [
        (make.files([(b"", make.header(1, endianness=1))], [b""]), "big-endian"),
        (make.files([(b"", make.header(1, min_consumer=2))], [b""]), "reader"),
        (make.files([(b"", make.header(0))], [b""]), "0 data files"),
        (make.files([(b"", make.header(100_000))], [b""]), "100000 data files"),
        (make.files([(b"", make.header(-1))], [b""]), "-1 data files"),
        (make.files([(b"a", make.header(1))], [b""]), "order"),
        (make.files([], []), "header"),
        (make.files([(b"", make.header(1)), (b"b", b""), (b"a", b"")], [b""]), "order"),
        (make.files([(b"", make.header(1)), (b"a", b""), (b"a", b"")], [b""]), "order"),
        (make.files([(b"", make.header(1)), (b"\xff", b"")], [b""]), "UTF-8"),
        (make.files([(b"", make.header(1)), (b"a" * 5000, b"")], [b""]), "block"),
        (entry_of(make.entry(1, (1,), 1, 0, b"abcd")), "outside of all data files"),
        (entry_of(make.entry(1, (1,), -1, 0, b"abcd")), "outside of all data files"),
        (entry_of(make.entry(1, (1,), 0, -4, b"abcd")), "outside of all data files"),
        (entry_of(make.entry(1, (1,), 0, 1 << 62, b"abcd")), "outside of all data files"),
        (entry_of(make.entry(1, (1,), 0, 4, b"abcd", size=-4)), "outside of all data files"),
        (entry_of(make.entry(1, (2,), 0, 0, b"abcd")), "size"),
        (entry_of(make.entry(1, (-1,), 0, 0, b"abcd")), "shape"),
        (entry_of(make.entry(1, (1,) * 33, 0, 0, b"abcd")), "shape"),
        (entry_of(make.entry(1, (1 << 32, 1 << 32), 0, 0, b"")), "shape"),
        (entry_of(make.entry(1, (0, 1 << 61, 1 << 61), 0, 0, b"")), "shape"),
        (entry_of(make.number(1, 1) + HUGE), "shape"),
        (entry_of(make.message(2, make.number(3, 1))), "shape"),
        (entry_of(MANY_AXES), "too large"),
        (entry_of(b"\x4b"), "protocol buffer"),
        (entry_of(make.varint(9 << 3 | 2) + make.varint(1 << 50)), "protocol buffer"),
        (entry_of(b"\x08" + b"\xff" * 10), "protocol buffer"),
        (entry_of(b"\x08\x80"), "protocol buffer"),
    ],
)
def test_wrong_claims_behind_valid_checksums(tmp_path, files, problem):
    put(tmp_path, files)
    check_error(tmp_path / "model.ckpt-10", "damaged", "model.ckpt-10", problem)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "restarts"),
        (b"\0\0\0", "restarts"),
        (b"\0\0\0\0", "restarts"),
        (b"\xff\xff\xff\xff", "restarts"),
        (b"\x01\0\0" + make.block([]), "outside of its block"),
        (b"\0\x09\0" + make.block([]), "outside of its block"),
        (b"\0\0" + make.varint(1 << 63) + make.block([]), "outside of its block"),
        (b"\0" + make.block([]), "cut off"),
        (b"\xff" * 9 + b"\x7f" + make.block([]), "digits"),
        (b"\xff" * 11 + make.block([]), "digits"),
    ],
)
def test_wrong_blocks_behind_valid_checksums(tmp_path, content, problem):
    table = make.joined(*make.table_parts([(b"x", content)]))
    put(tmp_path, {"model.ckpt-10.index": table})
    check_error(tmp_path, "damaged", "model.ckpt-10.index", problem)


@pytest.mark.parametrize("offset", [200, 1 << 31, 1 << 63])
def test_blocks_outside_of_the_file(tmp_path, offset):
    content = make.block(make.bundle(SMALL)[0])
    body, _, footer = make.table_parts([(b"b", content)])
    put(tmp_path, make.checkpoint(SMALL))
    outside = make.varint(offset) + make.varint(len(content))
    put(tmp_path, {"model.ckpt-10.index": make.joined(body, make.block([]), outside + footer)})
    check_error(tmp_path, "damaged", "outside of the file")


def test_overlapping_and_compressed_blocks(tmp_path):
    pairs, data = make.bundle(SMALL)
    content = make.block(pairs)
    body, _, footer = make.table_parts([(b"b", content)])
    twice = make.block([(b"b", make.handle(0, content)), (b"c", make.handle(0, content))])
    files = make.files(pairs, data)
    footer = footer[:-1] + bytes([len(twice)])
    put(tmp_path, {**files, "model.ckpt-10.index": make.joined(body, twice, footer)})
    check_error(tmp_path, "damaged", "overlap")
    snappy = make.joined(*make.table_parts([(b"b", content)], compression=1))
    put(tmp_path, {**files, "model.ckpt-10.index": snappy})
    check_error(tmp_path, "damaged", "compressed")


@pytest.mark.parametrize(
    "entry",
    [
        make.entry(1, (1,), 0, 1 << 61, b"abcd"),
        make.entry(1, (1 << 40,), 0, 0, b"", size=1 << 42),
        make.entry(1, (2,), 0, 0, b"abcdefgh"),
    ],
)
def test_claims_beyond_a_data_file_allocate_nothing(tmp_path, entry):
    put(tmp_path, entry_of(entry))
    with (
        fuzz.limits(),
        open_tf_checkpoint(tmp_path) as checkpoint,
        user_error("damaged", "'x'"),
    ):
        checkpoint.read("x")


@pytest.mark.parametrize(
    ("target", "cases"),
    [("tf_checkpoint", 900), ("tf_checkpoint_tar", 300), ("tf_checkpoint_tar_gz", 300)],
)
def test_random_damage(target, cases):
    tally = fuzz.fuzz(fuzz.TARGETS[target](), range(cases), seed=1)
    assert tally.findings == []
    # A reader that rejects everything has not been tested.
    assert tally.outcomes["right"] > cases / 50
    assert tally.outcomes["refused"] > cases / 5


@pytest.mark.parametrize(
    ("reader", "finding"),
    [
        (lambda folder: {}[(folder / "x").read_bytes()], "KeyError"),
        (lambda folder: bytearray(3 << 30), "MemoryError"),
        (lambda folder: 1 if (folder / "x").read_bytes() == b"12345678" else 2, "wrong values"),
    ],
)
def test_the_fuzzer_finds_planted_faults(reader, finding):
    def read(folder):
        first.append(folder)
        return 1 if len(first) == 1 else reader(folder)

    first = []
    tally = fuzz.fuzz(fuzz.Target({"x": b"12345678"}, read), range(20))
    assert sum(finding in line for line in tally.findings) > 10


def test_the_fuzzer_ends_a_hang():
    with pytest.raises(fuzz.Hang), fuzz.limits(seconds=0.1):
        time.sleep(10)
