import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from localagg.cli.main import main
from localagg.data import open_images
from localagg.data.images.headers import HEAD
from localagg.data.inspect.identical_images import digest, groups
from localagg.data.inspect.inspect_dataset import inspect, nearly_empty, summary_rows
from localagg.data.pack.pack_dataset import pack, pack_rows
from localagg.errors import UserError


def test_everything_is_counted_and_the_unreadable_are_named(pictures, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = data / "train" / "temple" / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (data / "train" / "flower" / "02.jpg").write_bytes(b"")
    expected = [
        {"name": "flower/02.jpg", "reason": "empty file"},
        {"name": "temple/05.jpg", "reason": "truncated"},
    ]
    size = sum(file.stat().st_size for file in (data / "train").rglob("*.*"))
    for workers in (0, 2):
        result = inspect(str(data), workers=workers)
        facts = result["splits"]["train"]
        assert (facts["images"], facts["bytes"]) == (48, size)
        assert facts["classes"] == {"flower": 24, "temple": 24}
        assert facts["formats"] == {"JPEG": 34, "PNG": 12}
        assert facts["modes"] == {"RGB": 46}
        assert facts["height"] == [48, 64, 64]  # 23 images each: the upper median
        told = facts["unreadable"]
        assert [bad["name"] for bad in told] == [bad["name"] for bad in expected]
        for bad, wanted in zip(told, expected, strict=True):
            assert wanted["reason"] in bad["reason"].lower()  # Pillow's words vary
        assert result["splits"]["val"]["images"] == 12
        assert result["splits"]["val"]["unreadable"] == []
        json.dumps(result)
    rows = dict(summary_rows(facts))
    assert rows["unreadable"] == "2"
    assert rows["classes"] == "2 of 24 to 24 images"
    assert rows["  flower/02.jpg"] == "empty file"


def test_many_unreadable_are_counted_and_few_printed(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    facts = inspect(str(tmp_path))["splits"]["train"]
    assert len(facts["unreadable"]) == 9
    assert facts["height"] is None
    assert facts["duplicates"]["images"] == 0  # of what cannot be read nothing is said
    rows = summary_rows(facts)
    assert rows[-2] == ["  and 4 more", "all are in --json FILE"]


@pytest.fixture
def splits_of(pictures, tmp_path):
    """A saved dataset of 12 pictures in each of some splits."""

    def save(*names):
        import datasets

        source = open_images(pictures, "val")
        rows = [{"image": {"bytes": image, "path": None}} for _, image, _ in source]
        table = datasets.Dataset.from_list(rows)
        folder = tmp_path / "-".join(names)
        datasets.DatasetDict(dict.fromkeys(names, table)).save_to_disk(folder)
        return str(folder)

    return save


def test_every_split_is_looked_at_and_others_are_told(splits_of, capsys):
    result = inspect(splits_of("train", "validation", "test", "extra"))
    assert list(result["splits"]) == ["train", "val", "test"]
    shared = [facts["shared"] and facts["shared"]["images"] for facts in result["splits"].values()]
    assert shared == [None, 12, 12]
    assert result["left_out_splits"] == ["extra"]
    assert "also has the splits extra," in " ".join(capsys.readouterr().err.split())


def test_held_out_images_alone_are_looked_at(splits_of, capsys):
    uri = splits_of("test")
    facts = inspect(uri)["splits"]
    assert (list(facts), facts["test"]["images"], facts["test"]["shared"]) == (["test"], 12, None)
    assert main(["inspect", uri]) == 0
    assert "no split 'train'" in capsys.readouterr().err
    with pytest.raises(UserError, match="no split train, val or test; it has extra: rename one"):
        inspect(splits_of("extra"))


def test_pack_tells_of_splits_that_it_leaves_out(splits_of, tmp_path, capsys):
    report = pack(splits_of("train", "extra", "val", "validation"), tmp_path / "packed")
    assert list(report["splits"]) == ["train", "val"]
    written = json.loads((tmp_path / "packed" / "pack-report.json").read_text())
    assert written["left_out_splits"] == ["extra", "validation"]
    assert ["splits left out", "extra, validation"] in pack_rows(report)
    assert "also has the splits extra, validation," in " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match="no split train, val or test; it has extra"):
        pack(splits_of("extra"), tmp_path / "none")


# --- Duplicates -----------------------------------------------------------------------------------


def photo(seed: int, side: int = 240) -> bytes:
    """A JPEG longer than what is read of a header."""
    target = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(target, "JPEG", quality=95)
    return target.getvalue()


def test_equal_bytes_are_found_within_and_across_splits(tmp_path):
    """Long files too, of which ends and size agree but not the middle."""
    one, other = photo(0), photo(1)
    assert len(one) > 1.5 * HEAD
    middle = HEAD + 100
    twin = one[:middle] + bytes([one[middle] ^ 1]) + one[middle + 1 :]  # decodes, or not: no matter
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
    result = inspect(str(tmp_path))
    assert result["splits"]["train"]["duplicates"] == {
        "images": 2,
        "groups": 2,
        "labels_differ": 1,
        "named": [["a/0.jpg", "b/0.jpg"], ["b/1.jpg", "b/2.jpg"]],
    }
    assert result["splits"]["val"]["duplicates"]["images"] == 0
    assert result["splits"]["train"]["shared"] is None
    assert result["splits"]["val"]["shared"] == {"images": 2, "named": ["a/0.jpg", "b/1.jpg"]}
    told = summary_rows(result["splits"]["val"])
    assert ["in train too", "2, byte for byte"] in told
    assert ["  a/0.jpg", ""] in told
    told = dict(summary_rows(result["splits"]["train"]))
    assert told["duplicates"] == "2 repeat another, byte for byte; 1 times with another label"


def test_groups_are_those_of_a_dictionary():
    draws = np.random.RandomState(0)
    for _ in range(50):
        values = draws.randint(0, 8, draws.randint(0, 30))
        keys = np.array([b"" if v == 0 else digest(bytes([v])) for v in values], dtype="S16")
        expected: dict[int, list[int]] = {}
        for row, value in enumerate(values.tolist()):
            expected.setdefault(value, []).append(row)
        wanted = [rows for value, rows in expected.items() if value and len(rows) > 1]
        assert [group.tolist() for group in groups(keys)] == sorted(wanted)


def test_digests_tell_ends_from_wholes():
    assert digest(b"ab") == digest(b"ab", b"", 2)
    assert len({digest(b"ab"), digest(b"a", b"b"), digest(b"ab", b"", 3), digest(b"abc")}) == 4
    assert {len(digest(bytes([i]))) for i in range(200)} == {16}


# --- Nearly empty ---------------------------------------------------------------------------------


def test_nearly_empty_is_99_percent_within_8_levels():
    blank = torch.full((3, 100, 100), 120, dtype=torch.uint8)
    blank += torch.arange(-7, 8).repeat(2000)[: blank.numel()].view_as(blank).to(torch.uint8)
    assert nearly_empty(blank)
    dotted = blank.clone()
    dotted[:, :9, :10] = 255
    assert nearly_empty(dotted)  # 0.9 %
    dotted[:, :11, :10] = 255
    assert not nearly_empty(dotted)  # 1.1 %
    tinted = blank.clone()
    tinted[2, :, :50] = 0  # equal in two channels of three
    assert not nearly_empty(tinted)
    assert not nearly_empty(torch.arange(256, dtype=torch.uint8).expand(3, 64, 256))
    assert nearly_empty(torch.zeros(3, 1, 1, dtype=torch.uint8))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_empty_files_are_found_without_decoding_all(tmp_path, kind, pictures, monkeypatch):
    monkeypatch.setattr("localagg.data.inspect.inspect_dataset._DECODED", 1)
    for i in range(3):
        shutil.copy(pictures / "train" / "temple" / f"{4 * i:02d}.png", tmp_path)
        Image.new("RGB", (200, 150), (i * 90, 20, 60)).save(tmp_path / f"empty{i}.{kind}")
    facts = inspect(str(tmp_path))["splits"]["train"]
    assert facts["near_empty"] == [f"empty{i}.{kind}" for i in range(3)]
    assert facts["decoded"] == 4  # the first one, and the suspicious
    assert inspect(str(tmp_path), decode_all=True)["splits"]["train"]["decoded"] == 6


# --- Ctrl-C and progress --------------------------------------------------------------------------

SLOW = """
import sys, time
import localagg.data.inspect.inspect_dataset as module
from localagg.cli import main
look = module._look
def slow(*arguments):
    time.sleep(0.05)
    print("looking", flush=True)
    return look(*arguments)
module._look = slow
sys.exit(main(["inspect", sys.argv[1], "--workers", "2", "--recipe", "none"]))
"""


def test_ctrl_c_stops_at_once_and_leaves_no_process(pictures):
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(pictures)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "looking\n"
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, said = child.communicate(timeout=60)
    assert child.returncode == 130
    assert said.replace("\n", "").endswith("localagg: stopped.")
    assert "Traceback" not in said
    for _ in range(100):
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a worker is left")


def test_progress_is_told_while_images_are_looked_at(pictures, monkeypatch):
    """Chunk after chunk, not when all is done."""
    from localagg.data.inspect import inspect_dataset as module

    told = []
    monkeypatch.setattr(module, "_CHUNK", 7)
    reported = contextlib.nullcontext(lambda done, of: told.append((done, of)))
    monkeypatch.setattr(module, "show_progress", lambda what: reported)
    inspect(str(pictures / "train"))
    assert [done for done, of in told if of == 48] == [7, 14, 21, 28, 35, 42, 48]


TERMINAL = """
import sys
from localagg.io import console
from localagg.cli import main
shown = console.show_progress
def showing(what):
    print(what, "torch" in sys.modules, file=sys.stderr)
    return shown(what)
console.show_progress = showing
sys.exit(main(["inspect", sys.argv[1], "--recipe", "none"]))
"""


def test_files_are_counted_before_torch_is_loaded(tmp_path, pictures):
    """Which takes seconds."""
    (tmp_path / "a").symlink_to(pictures / "train" / "temple")
    for number in range(2000):
        (tmp_path / f"{number}.txt").touch()
    (tmp_path / "b").symlink_to(pictures / "train" / "temple")
    done = subprocess.run(
        [sys.executable, "-c", TERMINAL, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = done.stderr.splitlines()
    assert lines[1:3] == ["counting False", "starting: 48 image files False"]
    assert next(line for line in lines if "looking" in line) == "looking at train True"
