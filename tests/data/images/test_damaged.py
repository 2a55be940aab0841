"""Thousands of damaged inputs: each is unreadable for a reason, or listed as odd, or unchanged.

Decoders tolerate, and hide, a flipped bit or zeros in the data of JPEG, WebP, GIF, BMP, TIFF, PPM,
JPEG 2000 and AVIF files, which have no checksum (the one inside TIFF's deflate is not always
reached), but not zeros in a baseline JPEG; and a progressive JPEG that lost whole scans, which is a
coarser picture. In JPEG and GIF the pixels before the damage are right. A Parquet file written
without checksums hides damage of its images.
"""

import io
import warnings
import zlib
from typing import NamedTuple

import numpy as np
import pytest
import torch
from encode_image import encoded
from expect import user_error
from make_tars import tar
from PIL import Image, ImageFile, features
from sklearn.datasets import load_digits, load_sample_images

from localagg.data.images.decode import PIXEL_LIMIT, UnreadableImage, decode
from localagg.data.inspect.inspect_dataset import inspect
from localagg.data.loading.scan import load_or_scan, require_readable
from localagg.data.sources.open import open_images
from localagg.errors import UserError

# Formats without a checksum over their pixels.
UNCHECKED = {"JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF"}
BASELINE = ("JPEG-baseline", "JPEG-gray", "JPEG-cmyk")
FLIPS = 150


class Intact(NamedTuple):
    """A good image."""

    name: str
    format: str
    data: bytes
    extension: str


class Case(NamedTuple):
    """A damaged one."""

    name: str
    data: bytes
    intact: Intact
    damage: str
    position: int


def intact() -> list[Intact]:
    temple, flower = (
        Image.fromarray(photo[y : y + 40, x : x + 44])
        for photo, (y, x) in zip(load_sample_images().images, ((190, 300), (120, 260)), strict=True)
    )
    digit = Image.fromarray((load_digits().images[7] * 15).astype(np.uint8)).resize((24, 24))
    made = [
        ("baseline", temple, "JPEG", {"quality": 85}),
        ("progressive", flower, "JPEG", {"quality": 90, "progressive": True}),
        ("gray", digit, "JPEG", {"quality": 95}),
        ("color", temple.resize((24, 24)), "PNG", {}),
        ("digit", digit, "PNG", {}),
        ("lossy", flower, "WEBP", {"quality": 80}),
        ("lossless", flower.resize((20, 20)), "WEBP", {"lossless": True}),
        ("palette", flower.quantize(64), "GIF", {}),
        ("raw", temple.resize((20, 20)), "BMP", {}),
        ("cmyk", temple.convert("CMYK"), "JPEG", {"quality": 85}),
        ("raw", temple.resize((20, 20)), "TIFF", {}),
        ("deflate", temple, "TIFF", {"compression": "tiff_adobe_deflate"}),
        ("color", temple.resize((20, 20)), "PPM", {}),
        ("gray", digit, "PPM", {}),
        ("boxes", temple, "JPEG2000", {}),
        ("stream", temple, "JPEG2000", {"no_jp2": True}),
    ]
    if features.check("avif"):
        made.append(("lossy", flower, "AVIF", {}))
    extension = {"JPEG": "jpg", "JPEG2000": "jp2", "TIFF": "tif"}  # else the format's name
    return [
        Intact(
            f"{kind}-{name}",
            kind,
            encoded(picture, kind, **options),
            extension.get(kind, kind.lower()),
        )
        for name, picture, kind, options in made
    ]


def cases() -> list[Case]:
    """Cuts at every tenth byte and at the last ones, zeros for a third, lost ends, flipped bits."""
    found, draws = [], np.random.RandomState(0)
    for good in intact():
        size = len(good.data)
        cuts = sorted({*range(0, size, 10), size - 1, size - 2, size - 3})
        found += [_case(good, "cut", cut, good.data[:cut]) for cut in cuts]
        third = size // 3
        hole = good.data[:third] + bytes(third) + good.data[2 * third :]
        found.append(_case(good, "hole", third, hole))
        if good.name in BASELINE:  # the end is there, what is before it not
            start = good.data.index(b"\xff\xda") + 30
            found += [
                _case(good, "lost", cut, good.data[:cut] + b"\xff\xd9")
                for cut in range(start, size - 10, 10)
            ]
        for flip in range(FLIPS):
            position = int(draws.randint(size))
            data = bytearray(good.data)
            data[position] ^= 1 << draws.randint(8)
            found.append(_case(good, f"flip{flip}", position, bytes(data)))
    return found


def _case(good: Intact, damage: str, position: int, data: bytes) -> Case:
    name = f"{good.name}/{damage}-{position:05d}.{good.extension}"
    return Case(name, data, good, damage.rstrip("0123456789"), position)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """(folder, cases, facts of inspect, {"unreadable" or "odd": {name: reason}})."""
    root, damaged = tmp_path_factory.mktemp("damaged"), cases()
    for case in damaged:
        path = root / case.name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(case.data)
    facts = inspect(str(root), decode_all=True)["splits"]["train"]
    named = {
        trouble: {bad["name"]: bad["reason"] for bad in facts[trouble]}
        for trouble in ("unreadable", "odd")
    }
    return root, damaged, facts, named


def outcome(data: bytes) -> torch.Tensor | str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return decode(data)
        except UnreadableImage as error:
            return str(error)


def test_damage_is_found_unless_decoders_tolerate_it(corpus):
    _, damaged, facts, named = corpus
    assert len(damaged) >= 2000
    assert facts["images"] == facts["decoded"] + len(named["unreadable"]) == len(damaged)
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    tolerated, seen = 0, 0
    for case in damaged:
        found, right = outcome(case.data), decode(case.intact.data)
        if isinstance(found, str):
            assert named["unreadable"][case.name] == found != ""
            continue
        same = found.shape == right.shape and torch.equal(found, right)
        if case.damage == "cut":
            assert same, f"{case.name} gives wrong pixels"
            assert "its end" in named["odd"][case.name]
        elif case.damage == "lost" or (case.damage == "hole" and case.intact.name in BASELINE):
            assert same, f"{case.name} is filled with gray"
        elif not same and case.name not in named["odd"]:
            assert case.intact.format in UNCHECKED, f"{case.name} gives wrong pixels"
            tolerated += 1
        seen += case.damage == "flip" and case.name in named["odd"]
    assert tolerated  # else the list at the top is too long
    assert seen  # a strict decoder warns of some of them


def test_pixels_before_a_flipped_bit_are_right(corpus, monkeypatch):
    """As many rows as a decoder gets out of a file that is cut there."""
    _, damaged, _, _ = corpus
    compared = 0
    for case in damaged:
        if case.damage != "flip" or case.intact.name not in ("JPEG-baseline", "GIF-palette"):
            continue
        found, right = outcome(case.data), decode(case.intact.data)
        if isinstance(found, str) or found.shape != right.shape:
            continue
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
        try:
            cut = Image.open(io.BytesIO(case.intact.data[: case.position])).convert("RGB")
        except OSError:  # cut in its header
            continue
        finally:
            monkeypatch.undo()
        got = torch.from_numpy(np.array(cut)).permute(2, 0, 1)
        equal = (got == right).all(dim=2).all(dim=0)
        rows = int(equal.int().cumprod(0).sum())
        assert torch.equal(found[:, :rows], right[:, :rows]), case.name
        compared += rows > 8
    assert compared > 20


def test_the_header_scan_finds_every_cut_and_nothing_that_decodes(corpus):
    root, damaged, _, named = corpus
    source = open_images(root)
    unreadable = load_or_scan(source, memory="never").unreadable
    found = {source.name(index) for index in unreadable}
    cut = {case.name for case in damaged if case.damage == "cut"}
    assert cut & named["unreadable"].keys() <= found <= named["unreadable"].keys()
    with user_error("unreadable-images", f"{len(found):,}", f"{len(damaged):,}"):
        require_readable(source, unreadable, "error")


# --- One by one -----------------------------------------------------------------------------------


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body


def strange() -> dict[str, tuple[bytes, str, str]]:
    """{name: (bytes, "unreadable", "odd" or "good", a word of the reason)}."""
    good = {image.name: image.data for image in intact()}
    jpeg, png, bmp = good["JPEG-baseline"], good["PNG-color"], good["BMP-raw"]
    html = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    huge = bytearray(png)
    huge[16:24] = (60_000).to_bytes(4, "big") * 2
    huge[29:33] = zlib.crc32(bytes(huge[12:29])).to_bytes(4, "big")
    tall = bytearray(jpeg)
    frame = tall.index(b"\xff\xc0")
    tall[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    wide = bytearray(bmp)
    wide[18:22] = (2_000_000_000).to_bytes(4, "little")
    exif = (
        b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x12\x01\x09\0\xff\xff\xff\xff\xff\xff\xff\x7f" * 3
    )
    profile = b"ICC_PROFILE\0\1\1" + b"no profile at all" * 20
    missing = b"ICC_PROFILE\0\1\3" + b"\0" * 200  # the first of three parts
    return {
        "html.jpg": (html, "unreadable", "HTML"),
        "text.png": (b"hello" * 100, "unreadable", "text"),
        "empty.jpg": (b"", "unreadable", "empty file"),
        "zeros.jpg": (bytes(5000), "unreadable", "zeros"),
        "zeroed.jpg": (jpeg[:300] + bytes(len(jpeg) - 300), "unreadable", ""),
        "huge.png": (bytes(huge), "unreadable", "limit"),
        "tall.jpg": (bytes(tall), "unreadable", "limit"),
        "wide.bmp": (bytes(wide), "unreadable", "limit"),
        "called.png": (jpeg, "odd", "it is JPEG, not PNG"),
        "called.jpg": (good["WEBP-lossy"], "odd", "it is WEBP, not JPEG"),
        "called.gif": (png, "odd", "it is PNG, not GIF"),
        "exif.jpg": (jpeg[:2] + jpeg_segment(0xE1, exif) + jpeg[2:], "odd", "EXIF"),
        "icc.jpg": (jpeg[:2] + jpeg_segment(0xE2, profile) + jpeg[2:], "odd", "color profile"),
        "parts.jpg": (jpeg[:2] + jpeg_segment(0xE2, missing) + jpeg[2:], "odd", "color profile"),
        "more.jpg": (jpeg + b"<!-- appended -->", "odd", "its end"),
        "nul.jpg": (jpeg + bytes(100), "good", ""),
        "good.jpg": (jpeg, "good", ""),
    }


@pytest.mark.parametrize("decode_all", [False, True])
def test_strange_files_are_named_with_their_reason(tmp_path, decode_all):
    files = strange()
    for name, (data, _, _) in files.items():
        (tmp_path / name).write_bytes(data)
    facts = inspect(str(tmp_path), decode_all=decode_all)["splits"]["train"]
    for trouble in ("unreadable", "odd"):
        listed = {bad["name"]: bad["reason"] for bad in facts[trouble]}
        assert listed.keys() == {name for name, (_, kind, _) in files.items() if kind == trouble}
        for name, reason in listed.items():
            assert files[name][2] in reason, (name, reason)
    right = decode(files["good.jpg"][0])
    for name in ("exif.jpg", "icc.jpg", "parts.jpg", "more.jpg", "nul.jpg", "called.png"):
        assert torch.equal(decode(files[name][0]), right)
    assert PIXEL_LIMIT < 60_000**2


@pytest.mark.parametrize("checksums", [True, False])
def test_a_flipped_bit_in_a_table_is_an_error_if_it_has_checksums(tmp_path, checksums):
    import pyarrow as pa
    from pyarrow import parquet

    images, labels = [image.data for image in intact()], [n % 2 for n in range(len(intact()))]
    table = pa.table(
        {"image": [{"bytes": image, "path": None} for image in images], "label": labels}
    )
    # The types that ``datasets`` writes; damaged, they name types that do not exist.
    types = '{"info": {"features": {"image": {"_type": "Image"}, "label": {"dtype": "int64", '
    table = table.replace_schema_metadata({"huggingface": types + '"_type": "Value"}}}}'})
    parquet.write_table(table, tmp_path / "good.parquet", write_page_checksum=checksums)
    data = (tmp_path / "good.parquet").read_bytes()
    kind = data.index(b'"dtype"') + 1
    draws = np.random.RandomState(0)
    outcomes = {"same": 0, "error": 0, "other": 0}
    for flip in range(FLIPS):  # half of them in the footer
        first = len(data) - 1500 if flip % 2 else 0
        position = int(draws.randint(first, len(data))) if flip else kind
        damaged = bytearray(data)
        damaged[position] ^= 1 << draws.randint(8)
        path = tmp_path / f"{flip}.parquet"
        path.write_bytes(damaged)
        try:
            source = open_images(path)
            same = [source[i].image for i in range(len(source))] == images
            same = same and source.labels is not None and source.labels.tolist() == labels
            outcomes["same" if same else "other"] += 1
        except UserError:
            outcomes["error"] += 1
    assert min(outcomes["same"], outcomes["error"]) > 10
    assert (outcomes["other"] == 0) == checksums


def test_images_inside_tables_and_tars_are_named_by_their_record(tmp_path):
    import datasets

    jpeg = intact()[0].data
    contents = {"0.jpg": jpeg, "1.jpg": jpeg[:-20], "2.jpg": b"<html>"}
    (tmp_path / "a.tar").write_bytes(tar(contents))
    records = [{"image": {"bytes": data, "path": None}} for data in contents.values()]
    datasets.Dataset.from_list(records).to_parquet(tmp_path / "a.parquet")
    for uri, name in (("a.tar", "1.jpg of a.tar"), ("a.parquet", "record 1 of")):
        listed = inspect(str(tmp_path / uri))["splits"]["train"]["unreadable"]
        assert [bad["reason"].split(" (")[0] for bad in listed] == [
            "image file is truncated",
            "it is an HTML page; download it again",
        ]
        assert listed[0]["name"].startswith(name)
