"""Recognize a file by its first bytes, and say how to make images of it.

This module imports neither torch nor numpy, so that the command line starts quickly.
"""

from typing import NamedTuple

HEAD = 512  # bytes that decide

_HEIC = b"heic heix heim heis hevc hevx hevm hevs mif1 msf1".split()
_UNPACK = "unpack it"
_CONVERT = "convert it to PNG, TIFF or JPEG"
_AGAIN = "download it again"


class _Kind(NamedTuple):
    name: str
    fix: str
    start: bytes
    at: int = 0


IMAGE_KINDS = frozenset(
    ["JPEG", "PNG", "GIF", "BMP", "WebP", "AVIF", "TIFF", "JPEG 2000", "HEIC", "DICOM"]
)
_KINDS = (
    _Kind("JPEG", "", b"\xff\xd8\xff"),
    _Kind("PNG", "", b"\x89PNG\r\n\x1a\n"),
    _Kind("GIF", "", b"GIF8"),
    _Kind("WebP", "", b"WEBP", 8),
    _Kind("AVIF", "", b"ftypavi", 4),
    _Kind("JPEG 2000", "", b"\0\0\0\x0cjP"),
    _Kind("JPEG 2000", "", b"\xff\x4f\xff\x51"),
    _Kind("DICOM", "pip install 'localagg[dicom]'", b"DICM", 128),
    _Kind("a camera's raw file", _CONVERT, b"CR\x02\0", 8),
    _Kind("TIFF", "", b"II*\0"),
    _Kind("TIFF", "", b"MM\0*"),
    _Kind("TIFF", "", b"II+\0"),
    _Kind("TIFF", "", b"MM\0+"),
    _Kind("a Git LFS pointer", "run git lfs pull", b"version https://git-lfs"),
    _Kind("AppleDouble, metadata of macOS", "delete it", b"\0\x05\x16\x07"),
    _Kind("AppleSingle, metadata of macOS", "delete it", b"\0\x05\x16\0"),
    _Kind("a ZIP archive", _UNPACK, b"PK\x03\x04"),
    _Kind("a gzip archive", _UNPACK, b"\x1f\x8b"),
    _Kind("a bzip2 archive", _UNPACK, b"BZh"),
    _Kind("an xz archive", _UNPACK, b"\xfd7zXZ"),
    _Kind("a Zstandard archive", _UNPACK, b"\x28\xb5\x2f\xfd"),
    _Kind("a 7-Zip archive", _UNPACK, b"7z\xbc\xaf\x27\x1c"),
    _Kind("a RAR archive", _UNPACK, b"Rar!"),
    _Kind("a tar archive", _UNPACK, b"ustar", 257),
    _Kind("a PDF document", _CONVERT, b"%PDF"),
    _Kind("a PostScript document", _CONVERT, b"%!PS"),
    _Kind("a Photoshop document", _CONVERT, b"8BPS"),
    _Kind("JPEG XL", _CONVERT, b"\xff\x0a"),
    _Kind("JPEG XL", _CONVERT, b"\0\0\0\x0cJXL "),
    _Kind("OpenEXR", _CONVERT, b"\x76\x2f\x31\x01"),
    _Kind("Radiance HDR", _CONVERT, b"#?RADIANCE"),
    _Kind("FITS", _CONVERT, b"SIMPLE  ="),
    _Kind("a NumPy array", _CONVERT, b"\x93NUMPY"),
    _Kind("HDF5", _CONVERT, b"\x89HDF"),
    _Kind("a MATLAB file", _CONVERT, b"MATLAB 5.0"),
    _Kind("a Parquet file", "name it as --data", b"PAR1"),
    _Kind("an Arrow file", _CONVERT, b"ARROW1"),
    _Kind("a video", "extract its frames", b"ftyp", 4),
    _Kind("a video", "extract its frames", b"AVI ", 8),
    _Kind("a video", "extract its frames", b"\x1a\x45\xdf\xa3"),
    _Kind("an icon", _CONVERT, b"\0\0\1\0"),
    _Kind("a pickle, which may run programs", "load it where you trust it", b"\x80\x04"),
    _Kind("a pickle, which may run programs", "load it where you trust it", b"\x80\x02"),
)
_TEXTS = (
    (b"<!doctype html", "an HTML page", _AGAIN),
    (b"<html", "an HTML page", _AGAIN),
    (b"<svg", "an SVG drawing", _CONVERT),
    (b"<?xml", "an XML document", _CONVERT),
    (b"{", "JSON text", _AGAIN),
)

# Files that are not images, by extension, where their kind has a remedy.
SUFFIX_FIXES = {
    **dict.fromkeys([".zip", ".gz", ".tgz", ".tar.gz", ".bz2", ".xz", ".7z", ".rar"], "unpack"),
    **dict.fromkeys([".tar", ".parquet"], "name it as --data"),
    **dict.fromkeys([".csv", ".tsv", ".jsonl"], "name it as --data if it lists the images"),
    **dict.fromkeys([".npy", ".npz", ".mat", ".h5", ".hdf5", ".nii", ".fits"], "convert to images"),
    **dict.fromkeys([".svg", ".psd", ".pdf", ".exr", ".hdr", ".jxl", ".ico"], "convert to images"),
    **dict.fromkeys([".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".raf"], "convert to images"),
    **dict.fromkeys([".mp4", ".mov", ".avi", ".mkv", ".webm"], "extract frames"),
}


def kind_of(head: bytes) -> str:
    """Return what the first bytes of a file say that it is; empty if they say nothing."""
    return _recognize(head)[0]


def describe(head: bytes) -> str:
    """Return what a file is and how to make an image of it, in a few words.

    Args:
        head: its first bytes, :data:`HEAD` or more; fewer only if the file is shorter.
    """
    name, fix = _recognize(head)
    if not name:
        return "not an image" if head else "empty file"
    return f"it is {name}" + (f"; {fix}" if fix else "")


def _recognize(head: bytes) -> tuple[str, str]:
    """Return (kind, remedy), both empty if unknown."""
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC:
        return "HEIC", "pip install 'localagg[heic]'"
    if head[:2] == b"BM" and len(head) > 30 and head[6:10] == bytes(4):
        return "BMP", ""
    for kind in _KINDS:
        if head.startswith(kind.start, kind.at):
            return kind.name, kind.fix
    text = head[:HEAD].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for start, name, fix in _TEXTS:
        if text.startswith(start):
            return ("an SVG drawing", _CONVERT) if b"<svg" in text else (name, fix)
    if len(head) > 64 and not head[:HEAD].strip(b"\0"):
        return "a file of zeros", _AGAIN
    if head and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in head[:HEAD]):
        return "text", _AGAIN
    return "", ""
