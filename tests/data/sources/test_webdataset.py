"""WebDataset tars: Python's tarfile as the independent writer and reader, and damage."""

import gzip
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import fuzz
import pytest
from make_tars import by_tarfile, tar

from localagg.data import open_images
from localagg.data.sources.open import stored_splits
from localagg.data.sources.tar_index import split_name
from localagg.errors import UserError

MEMBERS = {"0.jpg": b"zero", "0.cls": b"2", "1.png": b"one" * 300, "1.cls": b"0"}


def write(path, members, format=tarfile.PAX_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(tar(members, format))
    return path


def contents(source):
    return [(source[i].image, source[i].label) for i in range(len(source))]


@pytest.fixture
def folder(tmp_path):
    """Two tars of two images."""
    write(tmp_path / "wds" / "train-000000.tar", MEMBERS)
    write(
        tmp_path / "wds" / "train-000001.tar",
        {"2.jpeg": b"", "2.cls": b"1", "3.webp": b"3", "3.cls": b"1"},
    )
    return tmp_path / "wds"


EXPECTED = [(b"zero", 2), (b"one" * 300, 0), (b"", 1), (b"3", 1)]


# --- What is read ---------------------------------------------------------------------------------


def test_the_order_is_that_of_files_and_members_and_labels_are_read(folder):
    source = open_images(folder)
    assert contents(source) == EXPECTED
    assert [source[i].index for i in range(4)] == [0, 1, 2, 3]
    assert source.labels.tolist() == [2, 0, 1, 1]
    assert source.classes == ["0", "1", "2"]
    assert source.name(1) == "1.png of train-000000.tar"
    assert source.stored_bytes() == 905
    assert contents(pickle.loads(pickle.dumps(source))) == EXPECTED
    with pytest.raises(IndexError):
        source[4]


@pytest.mark.parametrize(
    "uri",
    [
        "{}",
        "{}/train-*.tar",
        "{}/*.tar",
        "{}/train-00000?.tar",
        "{}/train-{{000000..000001}}.tar",
        "{}/train-00000{{0..1}}.tar",
    ],
)
def test_folders_patterns_and_ranges_name_the_same(folder, uri):
    assert contents(open_images(uri.format(folder))) == EXPECTED


def test_single_files_and_what_is_missing(folder):
    assert contents(open_images(folder / "train-000001.tar")) == EXPECTED[2:]
    for uri in ("train-{000000..000002}.tar", "none-*.tar"):
        with pytest.raises(UserError, match="There is no tar"):
            open_images(f"{folder}/{uri}")
    with pytest.raises(UserError, match="names no tars"):
        open_images(f"{folder}/train-{{5..2}}.tar")
    with pytest.raises(UserError, match="There is no file or folder"):
        open_images(folder / "none.tar")


def test_splits_are_in_names_or_folders(tmp_path):
    for name in ("imagenet1k-train-00.tar", "imagenet1k-validation-00.tar", "x.tar"):
        write(tmp_path / "a" / name, {"0.jpg": name.encode()})
    assert stored_splits(tmp_path / "a") == ["train", "val"]
    assert [image for image, _ in contents(open_images(tmp_path / "a"))] == [
        b"imagenet1k-train-00.tar",
        b"x.tar",
    ]
    assert open_images(tmp_path / "a", "val")[0].image == b"imagenet1k-validation-00.tar"
    assert len(open_images(f"{tmp_path}/a/*validation*.tar")) == 1  # what is named is meant
    for split in ("train", "test"):
        write(tmp_path / "b" / split / "0.tar", {"0.jpg": split.encode()})
    assert stored_splits(tmp_path / "b") == ["train", "test"]
    assert open_images(tmp_path / "b", "test")[0].image == b"test"


def test_archives_beside_what_was_unpacked_are_not_meant(pictures, folder):
    (folder / "train").symlink_to(pictures / "train")
    assert open_images(folder).classes == ["flower", "temple"]
    (folder / "train").unlink()
    (folder / "0.jpg").write_bytes(b"a")
    assert len(open_images(folder)) == 1


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_is_read_as_tarfile_does(tmp_path, format):
    long = "d" * 90 + "/" + "e" * (90 if format == tarfile.USTAR_FORMAT else 190)
    members = {
        f"{long}.jpg": b"long",
        f"{long}.cls": b"7",
        "caf\u00e9.png": b"x",
        "caf\u00e9.cls": b"1",
    }
    write(tmp_path / "train-0.tar", members, format)
    source = open_images(tmp_path)
    assert contents(source) == [(b"long", 7), (b"x", 1)]
    assert source.name(1).startswith("caf\u00e9.png of")
    words = [(image, str(label)) for image, label in contents(source)]
    assert words == by_tarfile(tmp_path)


@pytest.mark.parametrize(
    ("members", "labels", "classes"),
    [
        ({"0.cls": b"cat", "1.cls": b"ant"}, [1, 0], ["ant", "cat"]),
        ({"0.json": b'{"label": 3}', "1.json": b'{"label": 0}'}, [3, 0], ["0", "1", "2", "3"]),
        ({"0.json": b'{"class": "b"}', "1.json": b'{"class": "a"}'}, [1, 0], ["a", "b"]),
        ({"0.json": b'{"caption": "x"}', "1.json": b"{}"}, None, None),
        ({"0.txt": b"1\n", "1.txt": b"0\n"}, [1, 0], ["0", "1"]),
        ({"0.txt": b"same", "1.txt": b"same"}, [0, 0], ["same"]),
        ({"0.txt": b"a photo of a cat", "1.txt": b"a dog"}, None, None),
        ({"0.cls": b"-1", "1.cls": b"-1"}, None, None),
        ({"0.cls": b"1", "0.json": b'{"label": 9}', "1.cls": b"0"}, [1, 0], ["0", "1"]),
        ({}, None, None),
    ],
)
def test_labels_are_numbers_words_fields_or_none(tmp_path, members, labels, classes, capsys):
    images = {"0.jpg": b"0", "1.jpg": b"1"}
    write(tmp_path / "t.tar", dict(sorted({**images, **members}.items())))
    for _ in range(2):  # built, and from the cache
        source = open_images(tmp_path / "t.tar")
        assert source.classes == classes
        assert (source.labels is None) == (labels is None)
        assert labels is None or source.labels.tolist() == labels
    captions = "0.txt" in members and labels is None
    assert ("captions" in capsys.readouterr().err) == captions


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"0.jpg": b"a", "0.cls": b"1", "1.jpg": b"b"},
            r"'1.jpg' in '.*' at byte \d+.* has no label",
        ),
        ({"0.jpg": b"a", "0.cls": b"-5"}, "has the label -5"),
        ({"0.jpg": b"a", "0.cls": b"9999999999"}, "has the label 9999999999"),
        ({"0.jpg": b"a", "0.cls": b"\xff\xfe"}, r"at byte 1,024: '0.cls' is no label"),
        ({"0.jpg": b"a", "0.json": b"{"}, "'0.json' is no label"),
        ({"0.jpg": b"a", "0.json": b"[" * 100_000}, "'0.json' is no label"),
        ({"0.jpg": b"a", "0.png": b"b"}, "two images of one sample, '0.jpg' and '0.png'"),
        (
            {"0.jpg": b"a", "1.jpg": b"b", "0.cls": b"1"},
            "the sample '0' a second time at byte 2,048",
        ),
        ({"a.txt": b"a"}, "holds no images"),
    ],
)
def test_samples_that_cannot_be_are_refused(tmp_path, members, message):
    write(tmp_path / "t.tar", members)
    with pytest.raises(UserError, match=message):
        open_images(tmp_path / "t.tar")


def test_masks_hidden_files_and_samples_without_an_image_are_passed_over(tmp_path, capsys):
    members = {
        "0.jpg": b"a",
        "0.seg.png": b"mask",
        "0.cls": b"0",
        "._0.jpg": b"mac",
        "1.txt": b"only text",
    }
    write(tmp_path / "t.tar", members)
    assert contents(open_images(tmp_path / "t.tar")) == [(b"a", 0)]
    assert "1 samples without an image" in " ".join(capsys.readouterr().err.split())
    assert split_name("a.b/c.D.PNG") == ("a.b/c", "d.png")


def test_class_names_are_kept_beside(folder):
    (folder / "classes-train.json").write_text(json.dumps(["ant", "bee", "cat"]))
    assert open_images(folder).classes == ["ant", "bee", "cat"]
    (folder / "classes-train.json").write_text(json.dumps(["ant"]))
    with pytest.raises(UserError, match="names 1 classes"):
        open_images(folder)


# --- Hostile names --------------------------------------------------------------------------------


def test_hostile_names_and_links_touch_nothing(tmp_path):
    before = tmp_path / "before.jpg"
    before.write_bytes(b"secret")
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in ("../../evil.jpg", "/etc/evil.png", str(before), "a\x1b[31m\nb.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
        for kind in (
            tarfile.SYMTYPE,
            tarfile.LNKTYPE,
            tarfile.FIFOTYPE,
            tarfile.CHRTYPE,
            tarfile.DIRTYPE,
        ):
            info = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            info.type, info.linkname = kind, str(before)
            archive.addfile(info)
    place = tmp_path / "in" / "here"
    place.mkdir(parents=True)
    (place / "t.tar").write_bytes(made.getvalue())
    everything = sorted(path for path in tmp_path.rglob("*") if "localagg-index" not in path.name)
    source = open_images(place / "t.tar")
    assert [image for image, _ in contents(source)] == [b"evil"] * 4  # and no links
    after = sorted(path for path in tmp_path.rglob("*") if "localagg-index" not in path.name)
    assert after == everything
    assert before.read_bytes() == b"secret"
    assert not Path("/etc/evil.png").exists()
    assert source.name(3) == "a?[31m?b.jpg of t.tar"


# --- Damage ---------------------------------------------------------------------------------------


def test_a_tar_cut_off_anywhere_is_refused_with_its_offset(tmp_path):
    whole = tar(MEMBERS)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "t.tar"
    for size in (*range(1, end + 1, 97), *range(512, end + 1, 512)):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=rf"'{path}' is damaged at byte [\d,]+: the file ends"):
            open_images(path)
    path.write_bytes(whole[: end + 512])
    assert len(open_images(path)) == 2


def test_a_damaged_header_is_named_and_hides_nothing(tmp_path):
    """Python's tarfile stops there without a word."""
    whole = bytearray(tar(MEMBERS))
    whole[1024 + 20] ^= 1  # of the second member
    path = tmp_path / "t.tar"
    path.write_bytes(whole)
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["0.jpg"]
    with pytest.raises(UserError, match=r"t.tar' is damaged at byte 1,024: no tar header"):
        open_images(path)
    whole[1024:1536] = bytes(512)  # looks like the end
    path.write_bytes(whole)
    with pytest.raises(UserError, match=r"at byte 1,024: there is more behind the tar's end mark"):
        open_images(path)


@pytest.mark.parametrize("opener", [gzip.compress, lambda data: b"PK\x03\x04" + data])
def test_what_is_no_plain_tar_is_refused(tmp_path, opener):
    (tmp_path / "t.tar").write_bytes(opener(tar(MEMBERS)))
    with pytest.raises(UserError, match=r"compressed by gzip|at byte 0: no tar header"):
        open_images(tmp_path / "t.tar")


def test_damage_after_opening_is_found_when_it_is_read(folder):
    source = open_images(folder)
    path = folder / "train-000000.tar"
    whole = path.read_bytes()
    write(path, {"0.jpg": b"zero", "0.cls": b"2", "1.png": b"shorter", "1.cls": b"0"})
    assert source[0].image == b"zero"
    with pytest.raises(UserError, match=r"at byte 2,048: it has changed since it was opened"):
        source[1]
    path.write_bytes(whole[:2600])
    with pytest.raises(UserError, match="changed since it was opened"):
        source[1]
    path.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match="changed since it was opened"):
        source[1]


def test_changed_tars_are_read_as_tarfile_does_or_refused():
    tally = fuzz.fuzz(fuzz.TARGETS["tars"](), range(500), seed=1)
    assert tally.findings == []
    assert min(tally.outcomes[kind] for kind in ("right", "refused", "other values")) > 10


# --- The cached index -----------------------------------------------------------------------------


@pytest.fixture
def built(monkeypatch):
    """The tars whose index was built, one by one."""
    from localagg.data.sources import tar_index

    real, calls = tar_index.build_index, []

    def build(folder, files):
        calls.append(files)
        return real(folder, files)

    monkeypatch.setattr(tar_index, "build_index", build)
    return calls


def test_the_index_is_built_once_and_again_when_a_tar_changes(folder, built):
    first = open_images(folder)
    again = open_images(folder)
    assert built == [["train-000000.tar", "train-000001.tar"]]
    assert contents(again) == contents(first)
    assert again.fingerprint() == first.fingerprint()
    open_images(folder / "train-000000.tar")  # another index beside it
    assert contents(open_images(folder)) == EXPECTED
    assert len(built) == 2
    write(folder / "train-000001.tar", {"2.jpg": b"new", "2.cls": b"0"})
    assert contents(open_images(folder))[2:] == [(b"new", 0)]
    assert open_images(folder).fingerprint() != first.fingerprint()
    assert len(built) == 3


@pytest.mark.parametrize("damage", [b"", b"junk" * 50, None])
def test_a_damaged_cache_is_built_anew(folder, built, damage):
    open_images(folder)
    (cache,) = folder.glob(".localagg-index-tar-train-*.safetensors")
    cache.write_bytes(cache.read_bytes()[:-9] if damage is None else damage)
    assert contents(open_images(folder)) == EXPECTED
    assert len(built) == 2


def test_a_read_only_folder_stays_untouched(folder, built, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    folder.chmod(0o555)
    try:
        assert contents(open_images(folder)) == contents(open_images(folder)) == EXPECTED
    finally:
        folder.chmod(0o755)
    assert sorted(os.listdir(folder)) == ["train-000000.tar", "train-000001.tar"]
    assert len(built) == 1
