import io

import numpy as np
from PIL import Image

from localagg.data.images.headers import HEAD
from localagg.data.inspect.identical_images import digest, group_identical
from localagg.data.inspect.inspect_dataset import inspect, summary_rows


def photo(seed: int, side: int = 240) -> bytes:
    """Return a JPEG longer than the part that is read of a header."""
    target = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(target, "JPEG", quality=95)
    return target.getvalue()


def test_identical_images_are_found_within_and_across_splits(tmp_path):
    """Also among long files whose ends and sizes agree but not the middle."""
    one, other = photo(0), photo(1)
    assert len(one) > 1.5 * HEAD
    middle = HEAD + 100
    twin = one[:middle] + bytes([one[middle] ^ 1]) + one[middle + 1 :]  # decodable or not
    files = {
        "train/a/0.jpg": one,
        "train/a/1.jpg": twin,
        "train/a/2.jpg": other,
        "train/b/0.jpg": one,
        "train/b/1.jpg": photo(2, 24),
        "train/b/2.jpg": photo(2, 24),
        "val/a/0.jpg": other,
        "val/b/0.jpg": photo(3, 24),
        "val/b/1.jpg": photo(2, 24),
        "val/b/2.jpg": twin[:-3] + b"\0\xff\xd9",
    }
    for name, data in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    splits = inspect(str(tmp_path))["splits"]
    assert splits["train"]["duplicates"] == {
        "images": 2,
        "groups": 2,
        "labels_differ": 1,
        "named": [["a/0.jpg", "b/0.jpg"], ["b/1.jpg", "b/2.jpg"]],
    }
    assert splits["val"]["duplicates"]["images"] == 0
    assert splits["train"]["shared"] is None
    assert splits["val"]["shared"] == {"images": 2, "named": ["a/0.jpg", "b/1.jpg"]}
    rows = dict(summary_rows(splits["val"]))
    assert rows["also in train"].startswith("2 ")
    assert "  a/0.jpg" in rows
    rows = dict(summary_rows(splits["train"]))
    assert rows["  b/0.jpg"] == "as a/0.jpg"


def test_groups_are_those_of_a_dictionary():
    draws = np.random.RandomState(0)
    for _ in range(50):
        values = draws.randint(0, 8, draws.randint(0, 30))
        keys = np.array([b"" if v == 0 else digest(bytes([v])) for v in values], dtype="S16")
        expected: dict[int, list[int]] = {}
        for row, value in enumerate(values.tolist()):
            expected.setdefault(value, []).append(row)
        wanted = [rows for value, rows in expected.items() if value and len(rows) > 1]
        assert [group.tolist() for group in group_identical(keys)] == sorted(wanted)


def test_digests_depend_on_head_tail_and_size():
    assert digest(b"ab") == digest(b"ab", b"", 2)
    assert len({digest(b"ab"), digest(b"a", b"b"), digest(b"ab", b"", 3), digest(b"abc")}) == 4
    assert {len(digest(bytes([i]))) for i in range(200)} == {16}
