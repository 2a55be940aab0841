import shutil

import pytest
from expect import user_error

from localagg.config import ViewConfig
from localagg.data.images.decode import decode
from localagg.data.loading.scan import load_or_scan, require_readable, typical_side
from localagg.data.sources.open import open_images


def test_images_of_different_sizes_cannot_be_held(pictures):
    with user_error("option-conflict", "--memory auto"):
        load_or_scan(open_images(pictures), memory="always")


def test_a_vanished_file_is_named(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "data")
    source = open_images(tmp_path / "data")
    (tmp_path / "data" / "flower" / "00.png").unlink()
    assert typical_side(source, ViewConfig()) > 0
    unreadable = load_or_scan(source, memory="never").unreadable
    with user_error("unreadable-images", "flower/00.png (No such file or directory);"):
        require_readable(source, unreadable, "error")
    require_readable(source, unreadable, "skip")
    with user_error("unreadable-images", "48 of 48", "and 45 more"):
        require_readable(source, dict.fromkeys(range(48), "damaged"), "skip")


def test_workers_scan_headers_as_the_main_process_does(pictures, tmp_path):
    shutil.copytree(pictures / "train", tmp_path / "data")
    for name in ("flower/02.jpg", "temple/11.jpg"):
        path = tmp_path / "data" / name
        path.write_bytes(path.read_bytes()[:-40])
    source = open_images(tmp_path / "data")
    found, reported = [], []
    for serial_below in (10_000, 0):
        scanned = load_or_scan(
            source,
            memory="never",
            workers=2,
            on_progress=lambda done, of: reported.append((done, of)),
            serial_below=serial_below,
            chunk=10,
        )
        assert scanned.pixels is None
        found.append((scanned.unreadable, scanned.sizes))
        assert reported == [(10, 48), (20, 48), (30, 48), (40, 48), (48, 48)]
        reported.clear()
    assert found[0] == found[1]
    assert list(found[0][0]) == [2, 35]
    assert found[0][1] == {
        tuple(decode(source[i].image).shape[1:]) for i in range(48) if i not in (2, 35)
    }


@pytest.mark.parametrize("damaged", [False, True])
def test_pixels_are_complete_if_every_image_is_readable(one_size, damaged):
    if damaged:
        (one_size.root / one_size.paths[0]).write_bytes(b"")
    scanned = load_or_scan(one_size)
    assert scanned.pixels.shape == (4, 3, 48, 48)
    assert (scanned.complete_pixels is None) == damaged


def test_the_typical_side_is_the_median_of_the_shorter_ones(pictures):
    source = open_images(pictures)
    sides = sorted(min(decode(source[i].image).shape[1:]) for i in range(48))
    assert typical_side(source, ViewConfig()) == sides[24]


def test_the_sample_of_a_huge_source_stays_within_it(pictures):
    """float32 has no 16,777,219."""
    source = open_images(pictures)

    class Huge(type(source)):
        def __len__(self):
            return 16_777_220

        def __getitem__(self, index):
            assert 0 <= index < len(self)
            return source[index % len(source)]

    source_of_many = object.__new__(Huge)
    source_of_many.__dict__.update(source.__dict__)
    assert typical_side(source_of_many, ViewConfig()) > 0
