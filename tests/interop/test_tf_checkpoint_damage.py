"""TensorFlow checkpoints that are missing, altered, or made to mislead."""

import fuzz
import make_tf_checkpoint as make
import pytest
from make_tf_checkpoint import SMALL, entry_of, put

from localagg.errors import UserError
from localagg.interop.tf_checkpoint import open_tf_checkpoint


def test_missing_and_foreign_files_are_named(tmp_path):
    files = make.checkpoint(SMALL, 2)
    put(tmp_path, files)
    table = files["model.ckpt-10.index"]

    def refused(name, message):
        with pytest.raises(UserError, match=message) as caught:
            open_tf_checkpoint(tmp_path / name)
        assert str(tmp_path) in str(caught.value)
        assert str(caught.value).count(". ") <= str(caught.value).count(". Did you mean")

    refused("model.ckpt-11", "There is no .*name the prefix.*Did you mean 'model.ckpt-10'")
    refused("nowhere/model.ckpt", "There is no TensorFlow checkpoint")
    put(tmp_path, {"notes.txt": b"text", "old-3": table})
    refused("notes.txt", "is not a TensorFlow checkpoint; name the prefix")
    refused("old-3", "is a V1 checkpoint, which is not read; load it in TensorFlow and save")
    put(tmp_path / "v1", {"old-3": table, "checkpoint": b'model_checkpoint_path: "old-3"'})
    refused("v1", "old-3' is a V1 checkpoint")
    put(tmp_path / "v1sharded", {"old-3-00000-of-00002": table})
    refused("v1sharded/old-3", "is a V1 checkpoint")
    (tmp_path / "empty").mkdir()
    refused("empty", "holds no TensorFlow checkpoint")
    put(tmp_path, {"text.index": b"text", "cut.index": table[:-1], "nothing.index": b""})
    for name in ("text", "cut", "nothing"):
        refused(name, f"{name}.index' is not a whole index of a TensorFlow V2 checkpoint")
    data = tmp_path / "model.ckpt-10.data-00001-of-00002"
    data.write_bytes(data.read_bytes()[:-1])
    refused("model.ckpt-10", "data-00001-of-00002' is truncated: it has 15 bytes of at least 16")
    data.unlink()
    refused("model.ckpt-10", "data-00001-of-00002' is missing; .*copy it beside")
    (tmp_path / "model.ckpt-10.index").unlink()
    refused("model.ckpt-10", "model.ckpt-10.index' is missing; .*copy it beside")


def test_altered_data_are_refused_where_they_are_read(tmp_path):
    put(tmp_path, make.checkpoint(SMALL))
    data = tmp_path / "model.ckpt-10.data-00000-of-00001"
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    with open_tf_checkpoint(tmp_path) as checkpoint:
        with pytest.raises(UserError, match="damaged: 'a/kernel' does not have its checksum"):
            checkpoint.read("a/kernel")
        assert checkpoint.read("b").tolist() == [1, -2]
        data.unlink()
        with pytest.raises(UserError, match=r"'b' in .* cannot be read: No such file"):
            checkpoint.read("b")


def test_every_flipped_bit_of_an_index_is_noticed(tmp_path):
    files = make.checkpoint(SMALL)
    put(tmp_path, files)
    table = files["model.ckpt-10.index"]
    padding = range(len(table) - 48, len(table) - 8)  # what is not a handle there has no checksum
    for at in set(range(len(table))) - set(padding):
        changed = bytearray(table)
        changed[at] ^= 1 << at % 8
        put(tmp_path, {"model.ckpt-10.index": bytes(changed)})
        with pytest.raises(UserError, match="not a whole index"):
            open_tf_checkpoint(tmp_path)


def test_what_is_listed_but_not_read(tmp_path):
    text = make.Raw(make.STRING, (2,), b"\x01\x02\0\0\0\0abc")
    sliced = make.Raw(1, (10, 4), b"", more=make.message(7, make.message(1, b"")))
    strange = make.Raw(99, (2,), b"abc")
    table = {"text": text, "sliced": sliced, "strange": strange, "\0\0slice": SMALL["b"]}
    put(tmp_path, make.checkpoint({**SMALL, **table}))
    with open_tf_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ["a/kernel", "b", "sliced", "strange", "text"]
        assert checkpoint.shape("sliced") == (10, 4)
        for name, reason in (
            ("text", "holds text"),
            ("sliced", "was saved in slices"),
            ("strange", "data type 99"),
        ):
            with pytest.raises(UserError, match=f"'{name}' .*{reason}.*leave this variable out"):
                checkpoint.read(name)
        with pytest.raises(UserError, match=r"no variable 'a/kernal'\. Did you mean 'a/kernel'"):
            checkpoint.read("a/kernal")


HUGE = make.message(2, make.message(2, make.number(1, 1 << 61)) * 2)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (make.files([(b"", make.header(1, endianness=1))], [b""]), "big-endian"),
        (make.files([(b"", make.header(1, min_consumer=2))], [b""]), "newer reader"),
        (make.files([(b"", make.header(0))], [b""]), "claims 0 data files"),
        (make.files([(b"", make.header(1 << 40))], [b""]), "claims 1099511627776 data files"),
        (make.files([(b"a", make.header(1))], [b""]), "not in order"),
        (make.files([], []), "no header"),
        (make.files([(b"", make.header(1)), (b"b", b""), (b"a", b"")], [b""]), "not in order"),
        (make.files([(b"", make.header(1)), (b"a", b""), (b"a", b"")], [b""]), "not in order"),
        (make.files([(b"", make.header(1)), (b"\xff", b"")], [b""]), "not UTF-8"),
        (make.files([(b"", make.header(1)), (b"a" * 5000, b"")], [b""]), "outside of its block"),
        (entry_of(make.entry(1, (1,), 1, 0, b"abcd")), "outside of all data files"),
        (entry_of(make.entry(1, (1,), -1, 0, b"abcd")), "outside of all data files"),
        (entry_of(make.entry(1, (1,), 0, -4, b"abcd")), "outside of all data files"),
        (entry_of(make.entry(1, (1,), 0, 1 << 62, b"abcd")), "outside of all data files"),
        (entry_of(make.entry(1, (1,), 0, 1 << 61, b"abcd")), "is truncated: it has 4 bytes"),
        (entry_of(make.entry(1, (1 << 40,), 0, 0, b"", size=1 << 42)), "is truncated"),
        (entry_of(make.entry(1, (2,), 0, 0, b"abcd")), "not that of its shape"),
        (entry_of(make.entry(1, (-1,), 0, 0, b"abcd")), "impossible shape"),
        (entry_of(make.entry(1, (1,) * 33, 0, 0, b"abcd")), "impossible shape"),
        (entry_of(make.entry(1, (1 << 32, 1 << 32), 0, 0, b"")), "impossible shape"),
        (entry_of(make.entry(1, (0, 1 << 61, 1 << 61), 0, 0, b"")), "impossible shape"),
        (entry_of(make.number(1, 1) + HUGE), "impossible shape"),
        (entry_of(make.message(2, make.number(3, 1))), "no known shape"),
        (entry_of(make.message(1, b"")), "wrong type"),
        (entry_of(b"\x0b"), "wrong type"),
        (entry_of(b"\x4b"), "unknown type"),
        (entry_of(make.varint(9 << 3 | 2) + make.varint(1 << 50)), "outside of its message"),
        (entry_of(b"\x08" + b"\xff" * 10), "too many digits"),
        (entry_of(b"\x08" + b"\xff" * 9 + b"\x7f"), "too many digits"),
        (entry_of(b"\x08\x80"), "cut off"),
    ],
)
def test_false_claims_behind_right_checksums(tmp_path, files, message):
    put(tmp_path, files)
    with fuzz.limits(), pytest.raises(UserError, match=message):
        open_tf_checkpoint(tmp_path / "model.ckpt-10")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "room for its restarts"),
        (b"\0\0\0", "room for its restarts"),
        (b"\0\0\0\0", "room for its restarts"),
        (b"\xff\xff\xff\xff", "room for its restarts"),
        (b"\x01\0\0" + make.block([]), "outside of its block"),
        (b"\0\x09\0" + make.block([]), "outside of its block"),
        (b"\0\0" + make.varint(1 << 63) + make.block([]), "outside of its block"),
        (b"\0" + make.block([]), "cut off"),
    ],
)
def test_false_blocks_behind_right_checksums(tmp_path, content, message):
    table = make.joined(*make.table_parts([(b"x", content)]))
    put(tmp_path, {"model.ckpt-10.index": table})
    with fuzz.limits(), pytest.raises(UserError, match=message):
        open_tf_checkpoint(tmp_path)


@pytest.mark.parametrize("offset", [200, 1 << 31, 1 << 63])
def test_blocks_that_lie_outside_of_the_file(tmp_path, offset):
    content = make.block(make.bundle(SMALL)[0])
    body, _, footer = make.table_parts([(b"b", content)])
    put(tmp_path, make.checkpoint(SMALL))
    outside = make.varint(offset) + make.varint(len(content))
    put(tmp_path, {"model.ckpt-10.index": make.joined(body, make.block([]), outside + footer)})
    with fuzz.limits(), pytest.raises(UserError, match="a block ends outside of the file"):
        open_tf_checkpoint(tmp_path)


def test_blocks_that_overlap_or_are_compressed(tmp_path):
    pairs, data = make.bundle(SMALL)
    content = make.block(pairs)
    body, _, footer = make.table_parts([(b"b", content)])
    twice = make.block([(b"b", make.handle(0, content)), (b"c", make.handle(0, content))])
    files = make.files(pairs, data)
    footer = footer[:-1] + bytes([len(twice)])
    put(tmp_path, {**files, "model.ckpt-10.index": make.joined(body, twice, footer)})
    with pytest.raises(UserError, match="its blocks overlap"):
        open_tf_checkpoint(tmp_path)
    snappy = make.joined(*make.table_parts([(b"b", content)], compression=1))
    put(tmp_path, {**files, "model.ckpt-10.index": snappy})
    with pytest.raises(UserError, match="it is compressed"):
        open_tf_checkpoint(tmp_path)


def test_a_small_file_cannot_claim_the_same_bytes_many_times(tmp_path):
    pairs = [(b"", make.header(1))]
    pairs += [(b"%03d" % i, make.entry(4, (4096,), 0, 0, bytes(4096))) for i in range(100)]
    put(tmp_path, make.files(pairs, [bytes(4096)]))
    with pytest.raises(UserError, match="it has 4,096 bytes of at least 409,600"):
        open_tf_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("target", "cases"),
    [("tf_checkpoint", 900), ("tf_checkpoint_tar", 300), ("tf_checkpoint_tar_gz", 300)],
)
def test_damaged_input(target, cases):
    tally = fuzz.fuzz(fuzz.TARGETS[target](), range(cases), seed=1)
    assert tally.findings == []
    # Both ways out are taken: a reader that refuses everything has not been tested.
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
def test_the_fuzzer_finds_what_is_planted(reader, finding):
    def read(folder):
        first.append(folder)
        return 1 if len(first) == 1 else reader(folder)

    first = []
    tally = fuzz.fuzz(fuzz.Target({"x": b"12345678"}, read), range(20))
    assert sum(finding in line for line in tally.findings) > 10


def test_the_fuzzer_ends_a_hang():
    def hang():
        while True:
            pass

    with pytest.raises(fuzz._Hang, match=r"0\.1 seconds"), fuzz.limits(seconds=0.1):
        hang()
