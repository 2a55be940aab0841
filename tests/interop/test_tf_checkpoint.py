import gzip
import io
import tarfile
from pathlib import Path

import fuzz
import make_tf_checkpoint as make
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from make_tf_checkpoint import SMALL, put

from localagg.errors import UserError
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
def test_what_was_written_is_read(tmp_path_factory, variables, shards, a_block):
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


def test_bfloat16_comes_as_float32(tmp_path):
    values = np.array([1.0, -2.5, 3.140625, 1e30, np.inf], "float32")
    upper = (values.view("uint32") >> 16).astype("<u2")
    put(tmp_path, make.checkpoint({"x": make.Raw(make.BFLOAT16, (5,), upper.tobytes())}))
    with open_tf_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.dtype("x") == np.float32
        expected = (upper.astype("uint32") << 16).view("float32")
        np.testing.assert_array_equal(checkpoint.read("x"), expected)
        assert checkpoint.read("x")[:3].tolist() == [1.0, -2.5, 3.140625]


def test_arrays_are_the_callers_own(tmp_path):
    put(tmp_path, make.checkpoint(SMALL))
    with open_tf_checkpoint(tmp_path) as checkpoint:
        checkpoint.read("b")[:] = 7
        assert checkpoint.read("b").tolist() == [1, -2]


@pytest.mark.parametrize(
    "name",
    [
        "checkpoint-10",
        "checkpoint-10.index",
        "checkpoint-10.meta",
        "checkpoint-10.data-00000-of-00002",
        "checkpoint",
        "",
    ],
)
def test_ways_to_name_it(tmp_path, name):
    put(tmp_path, make.checkpoint(SMALL, 2, "checkpoint-10"))
    put(tmp_path, {"checkpoint": b'model_checkpoint_path: "/old/machine/checkpoint-10"\n'})
    with open_tf_checkpoint(str(tmp_path / name)) as checkpoint:
        assert checkpoint.names == ["a/kernel", "b"]


def test_of_several_the_state_file_decides(tmp_path):
    put(tmp_path, make.checkpoint({"old": SMALL["b"]}, prefix="m-1"))
    put(tmp_path, make.checkpoint({"new": SMALL["b"]}, prefix="m-2"))
    with pytest.raises(UserError, match=r"several checkpoints \(m-1, m-2\): name one"):
        open_tf_checkpoint(tmp_path)
    put(tmp_path, {"checkpoint": b'model_checkpoint_path: "m-2"\n'})
    with open_tf_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ["new"]


@pytest.mark.parametrize("compression", ["", "gz"])
def test_in_an_archive(tmp_path, compression):
    files = make.checkpoint(SMALL, 2)
    members = {f"run/{name}": content for name, content in files.items()} | {"run/log.txt": b"log"}
    path = tmp_path / "weights.tar"
    path.write_bytes(make.archive(members, compression))
    with open_tf_checkpoint(path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.read("a/kernel"), SMALL["a/kernel"])
        unpacked = Path(checkpoint._unpacked.name)
        assert sorted(file.name for file in unpacked.iterdir()) == sorted(files)
    assert not unpacked.exists()


def member(name, kind=tarfile.REGTYPE, link=""):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for file, content in make.checkpoint(SMALL).items():
            info = tarfile.TarInfo(file)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, link
        tar.addfile(info)
    return out.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (member("../evil"), "leaves its folder: '../evil'"),
        (member("a/../../evil"), "leaves its folder: 'a/../../evil'"),
        (member("/etc/evil"), "leaves its folder: '/etc/evil'"),
        (member("c:\\evil"), "leaves its folder"),
        (member("link", tarfile.SYMTYPE, "/etc/passwd"), "a link, a device or sparse: 'link'"),
        (member("link", tarfile.LNKTYPE, "/etc/passwd"), "a link, a device or sparse: 'link'"),
        (member("pipe", tarfile.FIFOTYPE), "a link, a device or sparse: 'pipe'"),
        (member("device", tarfile.CHRTYPE), "a link, a device or sparse: 'device'"),
        (make.archive({"a.txt": b"text"}), "holds no TensorFlow checkpoint"),
        (
            make.archive({"a/x.index": b"", "b/y.index": b""}),
            r"several checkpoints \(a/x, b/y\): unpack it and name one",
        ),
        (b"no tar at all", "cannot be read .*; copy or pack it again"),
        (b"", "cannot be read .*; copy or pack it again"),
        (gzip.compress(b"no tar at all", mtime=0), "cannot be read .*; copy or pack it again"),
        (make.archive(make.checkpoint(SMALL))[:1000], "cannot be read .*; copy or pack it again"),
        (make.archive(make.checkpoint(SMALL), "gz")[:-30], "cannot be read .*; copy or pack"),
        (
            make.archive({"model.ckpt-10.index": make.checkpoint(SMALL)["model.ckpt-10.index"]}),
            r"c\.tar:model.ckpt-10.data-00000-of-00001' is missing",
        ),
        (b"PK\x03\x04 and so on", "holds PyTorch weights.*read_torch_port"),
    ],
)
def test_archives_that_are_refused(tmp_path, content, message):
    path = tmp_path / "c.tar"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_tf_checkpoint(path)


def claim(size, name="x", kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(2048)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (claim(1 << 40), "more than 16 GiB"),
        (claim(-512), "cannot be read"),
        (claim(1 << 33, kind=tarfile.GNUTYPE_LONGNAME), "claims an impossible size"),
        (claim(1 << 33, kind=tarfile.XHDTYPE), "claims an impossible size"),
        (claim(-1024, kind=tarfile.XHDTYPE), "cannot be read"),
        (claim(100 << 20, name="m.index") + bytes(100 << 20), "too large for an index"),
        (claim(0)[:512] * 10_001 + bytes(1024), "more than .* 10,000 members"),
        (claim(0, kind=tarfile.XHDTYPE)[:512] * 5_000 + bytes(1024), "cannot be read"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, lambda content: gzip.compress(content, 1, mtime=0)])
def test_archives_that_claim_too_much(tmp_path, content, message, compress):
    path = tmp_path / "c.tar"
    path.write_bytes(compress(content))
    with fuzz.limits(), pytest.raises(UserError, match=message):
        open_tf_checkpoint(path)
