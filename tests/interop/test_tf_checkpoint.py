import gzip
import io
import tarfile
import tempfile

import fuzz
import make_tf_checkpoint as make
import numpy as np
import pytest
from expect import user_error
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from make_tf_checkpoint import SMALL, put

from localagg.interop.tf_checkpoint import open_tf_checkpoint

names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda name: not name.startswith("\0")
)
variables = st.dictionaries(
    names,
    st.sampled_from(sorted(make.DTYPES)).flatmap(
        lambda dtype: arrays_of.arrays(dtype, arrays_of.array_shapes(min_dims=0, min_side=0))
    ),
    max_size=25,
)


@given(variables, st.integers(1, 3), st.integers(1, 7))
def test_variables_round_trip(tmp_path_factory, variables, shards, a_block):
    folder = tmp_path_factory.mktemp("checkpoint")
    pairs, data = make.bundle(variables, shards)
    put(folder, make.files(pairs, data, a_block=a_block))
    with open_tf_checkpoint(folder / "model.ckpt-10") as checkpoint:
        assert checkpoint.names == sorted(variables, key=str.encode)
        for name, expected in variables.items():
            found = checkpoint.read(name)
            assert found.flags.c_contiguous
            assert checkpoint.shape(name) == found.shape == expected.shape
            assert checkpoint.dtype(name) == found.dtype == expected.dtype
            assert found.tobytes() == expected.tobytes()


def test_bfloat16_is_read_as_float32(tmp_path):
    values = np.array([1.0, -2.5, 3.140625, 1e30, np.inf], "float32")
    upper = (values.view("uint32") >> 16).astype("<u2")
    put(tmp_path, make.checkpoint({"x": make.Raw(make.BFLOAT16, (5,), upper.tobytes())}))
    with open_tf_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.dtype("x") == np.float32
        expected = (upper.astype("uint32") << 16).view("float32")
        np.testing.assert_array_equal(checkpoint.read("x"), expected)
        assert checkpoint.read("x")[:3].tolist() == [1.0, -2.5, 3.140625]


def test_each_read_returns_a_new_array(tmp_path):
    put(tmp_path, make.checkpoint(SMALL))
    with open_tf_checkpoint(tmp_path) as checkpoint:
        checkpoint.read("b")[:] = 7
        assert checkpoint.read("b").tolist() == [1, -2]


@pytest.mark.parametrize(
    "name",
    ["checkpoint-10", "checkpoint-10.index", "checkpoint-10.meta",
     "checkpoint-10.data-00000-of-00002", "checkpoint", ""],
)  # fmt: skip
def test_ways_to_name_a_checkpoint(tmp_path, name):
    put(tmp_path, make.checkpoint(SMALL, 2, "checkpoint-10"))
    put(tmp_path, {"checkpoint": b'model_checkpoint_path: "/old/machine/checkpoint-10"\n'})
    with open_tf_checkpoint(str(tmp_path / name)) as checkpoint:
        assert checkpoint.names == ["a/kernel", "b"]


def test_the_state_file_chooses_among_several_checkpoints(tmp_path):
    put(tmp_path, make.checkpoint({"old": SMALL["b"]}, prefix="m-1"))
    put(tmp_path, make.checkpoint({"new": SMALL["b"]}, prefix="m-2"))
    with user_error("option-conflict", tmp_path, "m-1", "m-2"), open_tf_checkpoint(tmp_path):
        pass
    put(tmp_path, {"checkpoint": b'model_checkpoint_path: "m-2"\n'})
    with open_tf_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ["new"]


@pytest.mark.parametrize("compression", ["", "gz"])
def test_an_archive_is_unpacked_until_closed(tmp_path, monkeypatch, compression):
    files = make.checkpoint(SMALL, 2)
    members = {f"run/{name}": content for name, content in files.items()} | {"run/log.txt": b"log"}
    path, temporary = tmp_path / "weights.tar", tmp_path / "temporary"
    path.write_bytes(make.archive(members, compression))
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with open_tf_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a/kernel"), SMALL["a/kernel"])
        assert sorted(file.name for file in temporary.glob("*/*")) == sorted(files)
    assert not list(temporary.iterdir())


def test_a_data_file_missing_in_an_archive_is_named(tmp_path):
    table = make.checkpoint(SMALL)["model.ckpt-10.index"]
    path = tmp_path / "c.tar"
    path.write_bytes(make.archive({"model.ckpt-10.index": table}))
    with (
        open_tf_checkpoint(path) as checkpoint,
        user_error("not-found", "c.tar:model.ckpt-10.data-00000-of-00001"),
    ):
        checkpoint.read("b")


def archive_with(name, kind=tarfile.REGTYPE, link=""):
    """A tar of a checkpoint and one more member."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    out = io.BytesIO(make.archive(make.checkpoint(SMALL)))
    with tarfile.open(fileobj=out, mode="a") as tar:
        tar.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "code", "value"),
    [
        (archive_with("../evil"), "unsafe", "'../evil'"),
        (archive_with("a/../../evil"), "unsafe", "'a/../../evil'"),
        (archive_with("/etc/evil"), "unsafe", "'/etc/evil'"),
        (archive_with("c:\\evil"), "unsafe", "evil"),
        (archive_with("link", tarfile.SYMTYPE, "/etc/passwd"), "unsafe", "'link'"),
        (archive_with("link", tarfile.LNKTYPE, "/etc/passwd"), "unsafe", "'link'"),
        (archive_with("pipe", tarfile.FIFOTYPE), "unsafe", "'pipe'"),
        (archive_with("device", tarfile.CHRTYPE), "unsafe", "'device'"),
        (make.archive({"a.txt": b"text"}), "not-found", ".index"),
        (make.archive({"a/x.index": b"", "b/y.index": b""}), "option-conflict", "(a, b)"),
        (b"no tar at all", "damaged", "c.tar"),
        (b"", "damaged", "c.tar"),
        (gzip.compress(b"no tar at all", mtime=0), "damaged", "c.tar"),
        (make.archive(make.checkpoint(SMALL))[:1000], "damaged", "c.tar"),
        (make.archive(make.checkpoint(SMALL), "gz")[:-30], "damaged", "c.tar"),
        (b"PK\x03\x04 and so on", "unsupported", "PyTorch"),
    ],
)
def test_unsafe_and_damaged_archives_raise(tmp_path, content, code, value):
    path = tmp_path / "c.tar"
    path.write_bytes(content)
    with user_error(code, path, value), open_tf_checkpoint(path):
        pass


def claim(size, name="x", kind=tarfile.REGTYPE):
    """A tar header that claims a size."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (claim(1 << 40), "too-large"),
        (claim(-512), "damaged"),
        (claim(1 << 33, kind=tarfile.GNUTYPE_LONGNAME), "damaged"),
        (claim(1 << 33, kind=tarfile.XHDTYPE), "damaged"),
        (claim(-1024, kind=tarfile.XHDTYPE), "damaged"),
        (claim(100 << 20, name="m.index") + bytes(100 << 20), "damaged"),
        (claim(0)[:512] * 10_001 + bytes(1024), "too-large"),
        (claim(0, kind=tarfile.XHDTYPE)[:512] * 5_000 + bytes(1024), "damaged"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, lambda content: gzip.compress(content, 1, mtime=0)])
def test_archives_that_claim_too_much_raise(tmp_path, content, code, compress):
    path = tmp_path / "c.tar"
    path.write_bytes(compress(content))
    with user_error(code, path), fuzz.limits(), open_tf_checkpoint(path):
        pass
