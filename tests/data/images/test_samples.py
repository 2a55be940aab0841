"""Deep and scientific images: TIFF against tifffile's own reading, ranges, bands, pages, DICOM."""

import builtins
import io
import itertools
import logging
import struct
import warnings

import numpy as np
import pytest
import torch
from encode_image import encoded
from expect import user_error
from PIL import Image

from localagg.config import ViewConfig
from localagg.data import open_images
from localagg.data.images.decode import UnreadableImage, decode, decoded_size, open_image
from localagg.data.images.levels import Levels
from localagg.data.images.samples import measure_range
from localagg.data.loading.scan import load_or_scan
from localagg.data.pack.pack_dataset import pack
from localagg.data.sources.source import ImagePage

tifffile = pytest.importorskip("tifffile")
H, W = 40, 56
DTYPES = ("bool", "uint8", "uint16", "int8", "int16", "uint32", "float16", "float32")


def tiff(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tifffile.imwrite(file, values, **options)
    return file.getvalue()


def variants():
    """Yield (name, options, values [H, W, bands]) of all TIFF variants that tifffile writes."""
    draws = np.random.default_rng(0)
    for dtype, photometric, planar, order, compression, bands, tile in itertools.product(
        DTYPES,
        ("minisblack", "miniswhite", "rgb"),
        ("contig", "separate"),
        "<>",
        (None, "lzw", "zstd"),
        (1, 2, 3, 4),
        (None, (16, 16)),
    ):
        if (photometric == "rgb" and bands < 3) or (bands == 1 and planar == "separate"):
            continue
        if dtype == "bool" and (bands > 1 or compression == "lzw"):
            continue
        most = (
            2 if dtype == "bool" else 120 if dtype == "int8" else 250 if dtype == "uint8" else 2**15
        )
        values = draws.integers(0, most, (H, W, bands)).astype(dtype)
        options = {"photometric": photometric, "byteorder": order, "compression": compression}
        if tile:
            options["tile"] = tile
        if bands > 1:
            extra = ["unassalpha"] if photometric == "rgb" else [0] * (bands - 1)
            more = {"extrasamples": extra} if photometric != "rgb" or bands == 4 else {}
            options |= {"planarconfig": planar, **more}
        name = f"{dtype} {photometric} {planar} {order} {compression} {bands} {tile}"
        yield name, options, values


def expected(values: np.ndarray, photometric: str) -> np.ndarray | None:
    """Return levels uint8 [H, W, 3] by the documented rules; None for a variant that is refused."""
    if values.dtype == bool:
        levels = values.astype(np.uint8) * 255
    elif values.dtype == np.uint8:
        levels = values
    elif values.dtype == np.uint16:
        levels = (values // 256).astype(np.uint8)
    else:
        return None
    if values.shape[2] == 4 and photometric != "rgb":
        return None
    if photometric == "miniswhite":
        levels = 255 - levels
    return np.repeat(levels[:, :, :1], 3, axis=2) if values.shape[2] < 3 else levels[:, :, :3]


@pytest.mark.slow
def test_every_tiff_variant_is_tifffiles_or_refused():
    right = refused = 0
    for name, options, values in variants():
        stored = values if options.get("planarconfig") != "separate" else np.moveaxis(values, 2, 0)
        data = tiff(stored[:, :, 0] if values.shape[2] == 1 else stored, **options)
        due = expected(values, options["photometric"])
        if due is None:
            with pytest.raises(UnreadableImage, match=r"--range|--bands"):
                decode(data)
            refused += 1
            if values.dtype.kind != "b" and options["compression"] is None:
                mapped = decode(data, levels=Levels((1,), (0, 2**15)))[0].numpy()
                due = values[:, :, 0].astype(float)
                due = due if values.dtype == np.uint8 else (due / 2**15).clip(0, 1) * 255
                due = 255 - due if options["photometric"] == "miniswhite" else due
                assert np.abs(mapped - due).max() <= 1, name
            continue
        pixels = decode(data).permute(1, 2, 0).numpy()
        assert pixels.shape == due.shape, name
        assert np.abs(pixels.astype(int) - due).max() <= 1, name
        assert decoded_size(data) == (H, W)
        right += 1
    assert (right, refused) == (352, 1_176)


KINDS = [
    (np.dtype("uint16"), {"photometric": "rgb", "planarconfig": "separate"}, 3),
    (np.dtype("uint16"), {"photometric": "miniswhite"}, 1),
    (np.dtype("uint8"), {"photometric": "minisblack", "planarconfig": "separate"}, 3),
]


@pytest.mark.parametrize(("dtype", "options", "bands"), KINDS)
def test_variants_that_pillow_reads_wrong_are_right_or_name_the_extra(
    dtype, options, bands, monkeypatch
):
    values = np.random.default_rng(0).integers(0, 250, (H, W, bands)).astype(dtype) << (
        8 * (dtype.itemsize - 1)
    )
    stored = np.moveaxis(values, 2, 0) if bands > 1 else values[:, :, 0]
    data = tiff(stored, **options)
    due = expected(values, options["photometric"])
    assert torch.equal(decode(data), torch.from_numpy(due).permute(2, 0, 1))
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "tifffile":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnreadableImage, match=r"localagg\[scientific\]"):
        decode(data)


def test_a_range_maps_twelve_bits_in_sixteen_of_every_kind():
    values = np.linspace(0, 4095, H * W).reshape(H, W).astype(np.uint16)
    due = np.rint(values.astype(float) / 4095 * 255)
    levels = Levels(range=(0, 4095))
    png = encoded(Image.fromarray(values), "PNG")
    for data in (
        tiff(values),
        tiff(values, photometric="minisblack", byteorder=">"),
        png,
        tiff(values.astype(np.float32)),
        tiff(values.astype(np.int16)),
        tiff(np.stack([values] * 3, 2), photometric="rgb"),
    ):
        pixels = decode(data, levels=levels).numpy()
        assert np.abs(pixels - due).max() <= 0.5
    inverted = decode(tiff(values, photometric="miniswhite"), levels=levels)
    assert np.abs(inverted.numpy() - (255 - due)).max() <= 0.5
    assert decode(tiff(values)).max() == 15  # dark without a range
    photo = encoded(Image.new("RGB", (9, 9), (200, 3, 4)), "PNG")
    assert torch.equal(decode(photo, levels=levels), decode(photo))  # 8 bits stay


def test_sixteen_bit_color_png_is_mapped_from_all_bits():
    values = np.random.default_rng(0).integers(0, 4096, (H, W, 3)).astype(np.uint16)
    from torchvision.io import encode_png

    if not hasattr(torch, "uint16"):
        pytest.skip("no uint16")
    try:
        data = encode_png(torch.from_numpy(values).permute(2, 0, 1)).numpy().tobytes()
    except RuntimeError:
        data = _png16(values)
    pixels = decode(data, levels=Levels(range=(0, 4095))).permute(1, 2, 0).numpy()
    assert np.abs(pixels - values / 4095 * 255).max() <= 0.5


def _png16(values: np.ndarray) -> bytes:
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_bands_choose_three_of_many_or_one():
    values = np.random.default_rng(0).integers(0, 2**16, (H, W, 13)).astype(np.uint16)
    data = tiff(values, photometric="minisblack", planarconfig="contig")
    with pytest.raises(UnreadableImage, match="13 bands of 16 bits"):
        decode(data)
    chosen = decode(data, levels=Levels(bands=(4, 3, 2))).permute(1, 2, 0).numpy()
    assert np.array_equal(chosen, values[:, :, [3, 2, 1]] >> 8)
    one = decode(data, levels=Levels(bands=(13,)))
    assert torch.equal(one[0], torch.from_numpy((values[:, :, 12] >> 8).astype(np.uint8)))
    with pytest.raises(UnreadableImage, match="--bands names 14"):
        decode(data, levels=Levels(bands=(14,)))


def test_the_measured_range_is_that_of_the_samples(tmp_path, capsys):
    for i in range(4):
        values = np.full((H, W), 1000 + i, np.uint16)
        (tmp_path / f"{i}.tif").write_bytes(tiff(values))
    Image.new("RGB", (9, 9)).save(tmp_path / "x.png")
    assert measure_range(open_images(tmp_path), None) == (1000, 1003)
    assert "1000 to 1003" in " ".join(capsys.readouterr().err.split())
    for i in range(4):
        (tmp_path / f"{i}.tif").unlink()
    with user_error("option-invalid", "auto", tmp_path):
        measure_range(open_images(tmp_path), None)


@pytest.mark.parametrize(
    "values", [{"range": (3.0, 3.0)}, {"range": ("auto", 1.0)}, {"bands": (1, 2)}]
)
def test_invalid_ranges_and_bands_raise(values):
    with user_error("option-invalid", *values):
        ViewConfig(**values)


@pytest.mark.parametrize("compression", [None, "deflate"])
def test_a_truncated_deep_tiff_is_unreadable(compression):
    values = np.random.default_rng(0).integers(0, 2**16, (3, H, W)).astype(np.uint16)
    data = tiff(values, photometric="rgb", planarconfig="separate", compression=compression)
    for cut in range(0, len(data), 997):
        with pytest.raises(UnreadableImage):
            decode(data[:cut])


def test_each_page_is_an_image(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    stack = np.random.default_rng(0).integers(0, 255, (20, H, W)).astype(np.uint8)
    (folder / "s.tif").write_bytes(tiff(stack, photometric="minisblack"))
    Image.new("L", (W, H), 7).save(folder / "t.png")
    assert len(open_images(folder)) == 2
    source = open_images(f"{folder}#pages=all")
    assert len(source) == 21
    assert source.name(3) == "s.tif page 4"
    for i in (0, 3, 19):
        assert np.array_equal(decode(source[i].image)[0].numpy(), stack[i])
    assert source.name(20) == "t.png"
    report = pack(f"{folder}#pages=all", tmp_path / "packed", verify=True)
    packed = open_images(tmp_path / "packed")
    assert (report["images"], len(packed)) == (21, 21)
    assert np.array_equal(decode(packed[3].image)[0].numpy(), stack[3])


def test_pages_of_deep_and_odd_tiff_are_read():
    stack = np.random.default_rng(0).integers(0, 2**16, (3, H, W)).astype(np.uint16)
    data = tiff(stack, photometric="miniswhite")
    for page in range(3):
        pixels = decode(ImagePage(data, page))
        assert np.array_equal(pixels[0].numpy(), 255 - (stack[page] >> 8))


def test_heic_is_read_by_content(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    photo = Image.fromarray(np.full((H, W, 3), (200, 100, 50), np.uint8))
    heif.from_pillow(photo).save(tmp_path / "a.jpg", quality=90)
    (tmp_path / "b.HEIC").write_bytes((tmp_path / "a.jpg").read_bytes())
    source = open_images(tmp_path)
    for i in range(2):
        pixels = decode(source[i].image, upright=True).float()
        assert pixels.shape == (3, H, W)
        assert (pixels.mean((1, 2)) - torch.tensor([200.0, 100, 50])).abs().max() < 4


def dicom(values: np.ndarray, **fields) -> bytes:
    pydicom = pytest.importorskip("pydicom")
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.7"
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    color = values.ndim == 3
    found.Rows, found.Columns = values.shape[:2]
    found.SamplesPerPixel = 3 if color else 1
    if color:
        found.PlanarConfiguration = 0
    found.PhotometricInterpretation = "RGB" if color else "MONOCHROME2"
    found.BitsAllocated = values.dtype.itemsize * 8
    found.BitsStored, found.HighBit = found.BitsAllocated, found.BitsAllocated - 1
    found.PixelRepresentation = int(values.dtype.kind == "i")
    for name, value in fields.items():
        setattr(found, name, value)
    found.PixelData = values.tobytes()
    file = io.BytesIO()
    pydicom.dcmwrite(file, found, enforce_file_format=True)
    return file.getvalue()


def test_dicom_is_read_by_content_through_its_window(tmp_path):
    values = np.linspace(0, 4095, H * W).reshape(H, W).astype(np.int16)
    scale = {"RescaleSlope": 1, "RescaleIntercept": -1000}
    windowed = dicom(values, WindowCenter=1000, WindowWidth=2000, **scale)
    (tmp_path / "IM0001").write_bytes(windowed)
    (tmp_path / "1.2.840.1").write_bytes(dicom(values, **scale))
    source = open_images(tmp_path)
    assert source.paths == ["1.2.840.1", "IM0001"]
    units = values.astype(float) - 1000
    due = (units.clip(0, 2000) / 2000 * 255).round()
    assert np.abs(decode(source[1].image)[0].numpy() - due).max() <= 1
    with pytest.raises(UnreadableImage, match="--range"):
        decode(source[0].image)
    mapped = decode(source[0].image, levels=Levels(range=(0, 2000)))[0].numpy()
    assert np.abs(mapped - due).max() <= 1
    inverted = dicom(
        values,
        WindowCenter=1000,
        WindowWidth=2000,
        **scale,
        PhotometricInterpretation="MONOCHROME1",
    )
    assert np.abs(decode(inverted)[0].numpy() - (255 - due)).max() <= 1


def test_color_and_damaged_dicom():
    values = np.random.default_rng(0).integers(0, 255, (H, W, 3)).astype(np.uint8)
    data = dicom(values)
    assert torch.equal(decode(data), torch.from_numpy(values).permute(2, 0, 1))
    for cut in (140, len(data) // 2, len(data) - 9):
        with pytest.raises(UnreadableImage):
            decode(data[:cut])


REASONS = [
    (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    (b"\xef\xbb\xbf\n<!DOCTYPE html><html>", "HTML"),
    (b'<?xml version="1.0"?><svg xmlns="x">', "SVG"),
    (b"\0\x05\x16\x07" + bytes(40), "AppleDouble"),
    (b"PK\x03\x04" + bytes(40), "ZIP"),
    (b"\0\0\0\x18ftypmp42" + bytes(20), "video"),
    (b"\xff\x0a" + bytes(30), "JPEG XL"),
    (bytes(4096), "zeros"),
    (b'{"error": "not found"}', "JSON"),
    (b"Access denied", "text"),
    (b"\x89PNG\r\n\x1a\n" + bytes(40), "PNG"),
    (b"\x91\x02rubbish\x01", "not an image"),
    (b"", "empty file"),
]


@pytest.mark.parametrize(("data", "reason"), REASONS, ids=[reason for _, reason in REASONS])
def test_the_reason_says_what_the_file_is(data, reason):
    with pytest.raises(UnreadableImage, match=reason):
        open_image(data)


def test_pillows_own_lines_do_not_reach_the_user(capfd):
    values = np.zeros((H, W, 5), np.uint8)
    with pytest.raises(UnreadableImage):
        decode(tiff(values, photometric="minisblack", planarconfig="contig"))
    logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded")
    assert capfd.readouterr().err == ""


def test_each_frame_of_dicom_and_page_of_a_deep_tiff_is_an_image(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (4 * H, W)).astype(np.uint8)
    several = np.random.default_rng(1).integers(0, 2**16, (3, 5, H, W)).astype(np.uint16)
    for name, data, pages in (
        ("f.dcm", dicom(frames, Rows=H, NumberOfFrames=4), 4),
        ("b.tif", tiff(several, photometric="minisblack", planarconfig="separate"), 3),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_bytes(data)
        source = open_images(f"{folder}#pages=all")
        assert len(source) == pages
        options = {"memory": "never", "levels": Levels(bands=(1, 2, 3), range=(0, 2**16))}
        options = options if name == "b.tif" else {"memory": "never"}
        assert load_or_scan(open_images(folder), **options).pages == pages - 1
        assert load_or_scan(source, **options).pages == 0


def test_a_frame_of_dicom_is_that_frame(tmp_path):
    frames = np.random.default_rng(0).integers(0, 255, (3 * H, W)).astype(np.uint8)
    (tmp_path / "f.dcm").write_bytes(dicom(frames, Rows=H, NumberOfFrames=3))
    source = open_images(f"{tmp_path}#pages=all")
    for i in range(3):
        assert np.array_equal(decode(source[i].image)[0].numpy(), frames[i * H : (i + 1) * H])


def test_a_range_of_no_such_bands_is_one_sentence(tmp_path):
    Image.fromarray(np.arange(H * W, dtype=np.uint16).reshape(H, W)).save(tmp_path / "a.png")
    with user_error("option-conflict", "--range auto", "--bands"):
        measure_range(open_images(tmp_path), (1, 2, 3))
