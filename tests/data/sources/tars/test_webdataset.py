"""WebDataset tars: Python's tarfile as the independent writer and reader, and damage."""

import gzip
import io
import pickle
import tarfile
from pathlib import Path

import fuzz
import pytest
from expect import user_error
from make_tars import by_tarfile, sealed, tar

from localagg.data import open_images
from localagg.data.sources.open import stored_splits
from localagg.data.sources.tars.tar_index import split_name

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
    "pattern", ["", "*.tar", "train-00000?.tar", "train-{000000..000001}.tar", "t*-00000{0..1}.tar"]
)
def test_folders_patterns_and_ranges_name_the_same(folder, pattern):
    assert contents(open_images(f"{folder}/{pattern}")) == EXPECTED


def test_a_single_file_opens_and_a_missing_one_is_named(folder):
    assert contents(open_images(folder / "train-000001.tar")) == EXPECTED[2:]
    for name in ("train-{000000..000002}.tar", "none-*.tar", "none.tar"):
        with user_error("not-found", f"{folder}/{name}"):
            open_images(f"{folder}/{name}")
    with user_error("option-invalid", "{5..2}"):
        open_images(f"{folder}/train-{{5..2}}.tar")


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


def test_tars_beside_images_are_two_kinds(pictures, folder):
    """Neither is lost in silence; tars without images do not count."""
    (folder / "0.jpg").write_bytes(b"a")
    with user_error("mismatch", folder, "0.jpg", "tars (train-0"):
        open_images(folder)
    for path in folder.glob("*.tar"):
        write(path, {"notes.txt": b"a"})
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
        ({"0.cls": b"1"}, [1, -1], ["0", "1"]),
        ({"0.cls": b"b", "1.txt": b""}, [0, -1], ["b"]),
        ({"0.label.cls": b"1", "1.label.cls": b"0"}, [1, 0], ["0", "1"]),
        ({"0.label.cls": b"1", "0.cls": b"0", "1.cls": b"1"}, [0, 1], ["0", "1"]),
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
    ("members", "code", "values"),
    [
        ({"0.jpg": b"a", "0.cls": b"-5"}, "damaged", ["'0.jpg'", "byte 0", "label -5"]),
        ({"0.jpg": b"a", "0.cls": b"9999999999"}, "damaged", ["label 9999999999"]),
        ({"0.jpg": b"a", "0.cls": b"\xff\xfe"}, "damaged", ["byte 1,024", "'0.cls'"]),
        ({"0.jpg": b"a", "0.json": b"{"}, "damaged", ["'0.json'"]),
        ({"0.jpg": b"a", "0.json": b"[" * 100_000}, "damaged", ["'0.json'"]),
        ({"0.jpg": b"a", "0.png": b"b"}, "damaged", ["'0.jpg'", "'0.png'", "byte 1,024"]),
        ({"0.jpg": b"a", "1.jpg": b"b", "0.cls": b"1"}, "damaged", ["'0'", "byte 2,048"]),
        ({"a.txt": b"a"}, "no-images", []),
    ],
)
def test_invalid_samples_raise(tmp_path, members, code, values):
    write(tmp_path / "t.tar", members)
    with user_error(code, tmp_path, *values):
        open_images(tmp_path / "t.tar")


def test_masks_hidden_files_and_samples_without_an_image_are_skipped(tmp_path, capsys):
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


def test_hostile_names_and_links_touch_nothing(tmp_path):
    before = tmp_path / "before.jpg"
    before.write_bytes(b"secret")
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in ("../../evil.jpg", "/etc/evil.png", str(before), "a\x1b[31m\nb.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 4
            archive.addfile(info, io.BytesIO(b"evil"))
        for kind in b"12346":  # links, devices, a folder and a pipe
            info = tarfile.TarInfo(f"link{kind}.jpg")
            info.type, info.linkname = bytes([kind]), str(before)
            archive.addfile(info)
    place = tmp_path / "in" / "here"
    place.mkdir(parents=True)
    (place / "t.tar").write_bytes(made.getvalue())
    source = open_images(place / "t.tar")
    assert [image for image, _ in contents(source)] == [b"evil"] * 4  # and no links
    files = {path.name for path in tmp_path.rglob("*") if "localagg-index" not in path.name}
    assert files == {"before.jpg", "in", "here", "t.tar"}
    assert before.read_bytes() == b"secret"
    assert not Path("/etc/evil.png").exists()
    assert source.name(3) == "a?[31m?b.jpg of t.tar"


# --- Damage ---------------------------------------------------------------------------------------


def test_a_tar_cut_off_anywhere_raises_with_its_offset(tmp_path):
    whole = tar(MEMBERS)
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    path = tmp_path / "t.tar"
    for size in (*range(0, end + 1, 97), *range(512, end + 1, 512)):
        path.write_bytes(whole[:size])
        with user_error("damaged", path, "byte"):
            open_images(path)
    path.write_bytes(whole[: end + 512])
    assert len(open_images(path)) == 2


def test_a_damaged_header_is_named_and_hides_no_members(tmp_path):
    """Python's tarfile stops there silently."""
    whole = bytearray(tar(MEMBERS))
    whole[1024 + 20] ^= 1  # of the second member
    path = tmp_path / "t.tar"
    path.write_bytes(whole)
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["0.jpg"]
    with user_error("damaged", path, "byte 1,024: invalid tar header"):
        open_images(path)
    whole[1024:1536] = bytes(512)  # looks like the end
    path.write_bytes(whole)
    with user_error("damaged", path, "byte 1,024: data after"):
        open_images(path)


def header(name, size=0, kind=tarfile.REGTYPE):
    """A header with a correct checksum, whatever it claims."""
    info = tarfile.TarInfo(name)
    info.type = kind
    data = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    data[124:136] = (
        b"%011o\0" % size if size >= 0 else b"\xff" * 4 + size.to_bytes(8, "big", signed=True)
    )
    return sealed(bytes(data))


@pytest.mark.parametrize(
    "start",
    [
        header("a.jpg", 1 << 33),
        header("a.jpg", -512),
        header("a.jpg", -1024) * 2,
        header("a", 1 << 32, tarfile.XHDTYPE) + bytes(2 << 20),
        header("a", -512, tarfile.XHDTYPE),
        (header("a", 512, tarfile.XHDTYPE) + bytes(512)) * 2000,
        header("a.jpg", 0, tarfile.GNUTYPE_SPARSE),
    ],
    ids=["huge", "negative", "backward", "huge pax", "negative pax", "nested pax", "sparse"],
)
def test_hostile_headers_raise_without_large_reads(tmp_path, start):
    path = tmp_path / "t.tar"
    path.write_bytes(header("0.jpg") + start + bytes(1024))
    with user_error("damaged", path):
        open_images(path)


def test_compressed_and_other_files_are_unsupported_or_damaged(tmp_path):
    path = tmp_path / "t.tar"
    path.write_bytes(gzip.compress(tar(MEMBERS)))
    with user_error("unsupported", path, "gzip"):
        open_images(path)
    path.write_bytes(b"PK\x03\x04" + tar(MEMBERS))
    with user_error("damaged", path, "byte 0"):
        open_images(path)


def test_damage_after_opening_is_found_on_reading(folder):
    source = open_images(folder)
    path = folder / "train-000000.tar"
    whole = path.read_bytes()
    changed = tar({"0.jpg": b"zero", "0.cls": b"2", "1.png": b"shorter", "1.cls": b"0"})
    for content in (changed, whole[:2600], bytes(len(whole))):
        path.write_bytes(content)
        if content is changed:
            assert source[0].image == b"zero"
        with user_error("damaged", path, "byte 2,048"):
            source[1]


def test_changed_tars_are_read_as_tarfile_does_or_raise():
    tally = fuzz.fuzz(fuzz.TARGETS["tars"](), range(500), seed=1)
    assert tally.findings == []
    assert min(tally.outcomes[kind] for kind in ("right", "refused", "other values")) > 10


def test_the_cached_index_is_of_these_tars_alone(folder):
    first = open_images(folder).fingerprint()
    assert len(list(folder.glob(".localagg-index-tar-train-*.safetensors"))) == 1
    assert contents(open_images(folder / "train-000000.tar")) == EXPECTED[:2]
    assert contents(open_images(folder)) == EXPECTED
    write(folder / "train-000001.tar", {"2.jpg": b"new", "2.cls": b"0"})
    assert contents(open_images(folder))[2:] == [(b"new", 0)]
    assert open_images(folder).fingerprint() != first
