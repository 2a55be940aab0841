"""pack --size: the images that are shrunk, and the parts that they keep."""

import hashlib
import io
import shutil

import pytest
from PIL import Image

from localagg.data import open_images
from localagg.data.images.decode import decode, open_image, orientation
from localagg.data.pack.pack_dataset import pack
from localagg.data.pack.process_images import ShrinkOptions, estimate_bytes, hash_images


def test_larger_images_become_jpegs_of_the_asked_size(pictures, tmp_path):
    shutil.copytree(pictures / "val", tmp_path / "data")
    wide = Image.open(pictures / "val" / "temple" / "01.jpg").resize((300, 100))
    wide.save(tmp_path / "data" / "temple" / "wide.png")
    (tmp_path / "data" / "temple" / "x.jpg").write_bytes(b"<html>")
    uri = str(tmp_path / "data")
    report = pack(uri, tmp_path / "p", size=50, quality=80, verify=True)
    source, packed = open_images(uri), open_images(tmp_path / "p")
    facts = report["splits"]["train"]
    assert [bad["name"] for bad in facts["unreadable"]] == ["temple/x.jpg"]
    shrunk = 0
    for i in range(len(source)):
        if source.name(i) == "temple/x.jpg":
            assert packed[i].image == b"<html>"
            continue
        before = Image.open(io.BytesIO(source[i].image))
        if min(before.size) <= 50:
            assert packed[i].image == source[i].image
            continue
        shrunk += 1
        after = Image.open(io.BytesIO(packed[i].image))
        assert (after.format, min(after.size)) == ("JPEG", 50)
        scale = 50 / min(before.size)
        assert after.size == tuple(round(side * scale) for side in before.size)
        expected = io.BytesIO()
        smaller = before.convert("RGB").resize(after.size, Image.Resampling.LANCZOS)
        smaller.save(expected, "JPEG", quality=80)
        assert packed[i].image == expected.getvalue()
    assert 1 < shrunk == facts["shrunk"] < 12
    names = {source.name(i): i for i in range(len(source))}
    assert decode(packed[names["temple/wide.png"]].image).shape == (3, 50, 150)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_shrunk_images_keep_their_exif_orientation_alone(pictures, tmp_path, kind):
    """TIFF's own orientation is in the pixels."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    photo = Image.open(pictures / "val" / "temple" / "01.jpg").convert("RGB")
    (tmp_path / "data").mkdir()
    for side in (30, 96):
        photo.resize((side, side // 2)).save(tmp_path / "data" / f"{side}.jpg", kind, exif=exif)
    photo.resize((96, 48)).save(tmp_path / "data" / "plain.jpg", kind)
    pack(str(tmp_path / "data"), tmp_path / "packed", size=40)
    small, large, plain = (sample.image for sample in open_images(tmp_path / "packed"))
    assert small == (tmp_path / "data" / "30.jpg").read_bytes()
    assert decode(small, upright=True).shape == (3, 30, 15)
    assert decode(large, upright=True).shape == (3, 80, 40)
    assert decode(large).shape == ((3, 80, 40) if kind == "TIFF" else (3, 40, 80))
    assert decode(plain, upright=True).shape == (3, 40, 80)
    assert b"a description" in small
    assert b"a description" not in large
    assert orientation(open_image(plain)) == 1
    assert b"Exif" not in plain


def test_the_bytes_of_shrunk_images_are_estimated(pictures, tmp_path):
    source = open_images(pictures)
    report = pack(str(pictures / "train"), tmp_path / "p", size=24, quality=50)
    estimate = estimate_bytes(source, ShrinkOptions(24, 50))
    assert report["bytes"] < estimate < 1.3 * report["bytes"]
    assert estimate_bytes(source, None) == source.stored_bytes()


@pytest.mark.parametrize("workers", [0, 1])
def test_hashes_are_sha256_of_the_images_and_empty_for_missing_ones(pictures, tmp_path, workers):
    shutil.copytree(pictures / "val", tmp_path / "data")
    source = open_images(tmp_path / "data")
    (tmp_path / "data" / source.name(4)).unlink()
    paths = [tmp_path / "data" / source.name(i) for i in range(12)]
    expected = [hashlib.sha256(p.read_bytes()).digest() if p.exists() else b"" for p in paths]
    assert list(hash_images(source, workers)) == expected
