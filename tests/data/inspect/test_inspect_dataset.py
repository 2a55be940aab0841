import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from packed_folder import save_splits
from PIL import Image

from localagg.cli.main import main
from localagg.data.inspect.inspect_dataset import inspect, summary_rows
from localagg.data.loading.scan import load_or_scan
from localagg.data.sources.open import open_images
from localagg.errors import UserError


@pytest.mark.parametrize("workers", [0, 2])
def test_images_are_counted_and_the_unreadable_are_named(pictures, tmp_path, workers):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    broken = data / "train" / "temple" / "05.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    (data / "train" / "flower" / "02.jpg").write_bytes(b"")
    result = inspect(str(data), workers=workers)
    facts = result["splits"]["train"]
    size = sum(file.stat().st_size for file in (data / "train").rglob("*.*"))
    assert (facts["images"], facts["bytes"]) == (48, size)
    assert facts["classes"] == {"flower": 24, "temple": 24}
    assert facts["formats"] == {"JPEG": 34, "PNG": 12}
    assert facts["modes"] == {"RGB": 46}
    assert facts["height"] == [48, 64, 64]  # 23 images each: the upper median
    empty, truncated = facts["unreadable"]
    assert empty == {"name": "flower/02.jpg", "reason": "empty file"}
    assert truncated["name"] == "temple/05.jpg"
    assert "truncated" in truncated["reason"].lower()  # Pillow's words vary
    assert result["splits"]["val"]["images"] == 12
    assert result["splits"]["val"]["unreadable"] == []
    json.dumps(result)
    rows = dict(summary_rows(facts))
    assert rows["unreadable"] == "2"
    assert rows["classes"] == "2 of 24 to 24 images"
    assert rows["  flower/02.jpg"] == "empty file"


def test_of_many_unreadable_images_a_few_are_printed(tmp_path):
    for i in range(9):
        (tmp_path / f"{i}.jpg").write_bytes(b"x")
    facts = inspect(str(tmp_path))["splits"]["train"]
    assert len(facts["unreadable"]) == 9
    assert facts["height"] is None
    assert facts["duplicates"]["images"] == 0  # unreadable images are not compared
    rows = [name for name, _ in summary_rows(facts)]
    assert rows[-7:-1] == [f"  {i}.jpg" for i in range(5)] + ["  and 4 more"]


def test_every_split_is_inspected_and_others_are_reported(pictures, tmp_path, capsys):
    uri = save_splits(pictures, tmp_path / "data", "train", "validation", "test", "extra")
    result = inspect(uri)
    assert list(result["splits"]) == ["train", "val", "test"]
    shared = [facts["shared"] and facts["shared"]["images"] for facts in result["splits"].values()]
    assert shared == [None, 12, 12]
    assert result["left_out_splits"] == ["extra"]
    assert "extra" in capsys.readouterr().err


def test_a_data_set_may_have_held_out_images_alone(pictures, tmp_path, capsys):
    uri = save_splits(pictures, tmp_path / "data", "test")
    facts = inspect(uri)["splits"]
    assert (list(facts), facts["test"]["images"], facts["test"]["shared"]) == (["test"], 12, None)
    assert main(["inspect", uri]) == 0
    assert "'train'" in capsys.readouterr().err  # no epoch is timed
    with pytest.raises(UserError, match="extra"):
        inspect(save_splits(pictures, tmp_path / "extra", "extra"))


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_nearly_empty_images_are_found_without_decoding_all(tmp_path, kind, pictures):
    for i in range(3):
        shutil.copy(pictures / "train" / "temple" / f"{4 * i:02d}.png", tmp_path)
        Image.new("RGB", (200, 150), (i * 90, 20, 60)).save(tmp_path / f"empty{i}.{kind}")
    facts = inspect(str(tmp_path), samples=1)["splits"]["train"]
    assert facts["near_empty"] == [f"empty{i}.{kind}" for i in range(3)]
    assert facts["decoded"] == 4  # the first one, and the suspicious
    assert inspect(str(tmp_path), decode_all=True)["splits"]["train"]["decoded"] == 6


def test_progress_is_reported_chunk_by_chunk(pictures, monkeypatch):
    reported = []

    @contextlib.contextmanager
    def note(description):
        yield lambda done, total: reported.append((description, done))

    monkeypatch.setattr("localagg.data.inspect.inspect_dataset.show_progress", note)
    inspect(str(pictures / "train"), chunk=7)
    assert [done for name, done in reported if "train" in name] == [7, 14, 21, 28, 35, 42, 48]


SLOW = """
import sys, time
import localagg.data.inspect.inspect_image as module
from localagg.cli import main
original = module.inspect_image
def slow(*arguments, **options):
    time.sleep(0.5)
    print("inspecting", flush=True)
    return original(*arguments, **options)
module.inspect_image = slow
sys.exit(main(["inspect", sys.argv[1], "--workers", "2", "--recipe", "none"]))
"""


@pytest.mark.slow
def test_ctrl_c_stops_at_once_and_leaves_no_process(pictures):
    child = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(pictures)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "inspecting\n"
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does: to the workers too
    _, printed = child.communicate(timeout=60)
    assert child.returncode == 130
    assert printed.replace("\n", "").endswith("localagg: stopped.")
    assert "Traceback" not in printed
    for _ in range(100):
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a worker is left")


def test_levels_pages_and_orientation_are_reported(tmp_path):
    deep = np.linspace(7, 4095, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.tif")
    pages = [Image.new("L", (32, 32), level) for level in range(20)]
    pages[0].save(tmp_path / "stack.tif", save_all=True, append_images=pages[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (90, 60)).save(tmp_path / "side.jpg", exif=exif)
    facts = inspect(str(tmp_path))["splits"]["train"]
    assert facts["levels"] == {"16 bits a sample": {"images": 1, "low": 7, "high": 4095}}
    assert facts["pages"] == {"files": 1, "pages": 20}
    assert facts["turned"] == 1
    assert facts["near_empty"] == ["side.jpg", "stack.tif"]  # and not the dark one


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
def test_frames_that_are_not_read_are_counted(tmp_path, kind):
    frames = [Image.new("RGB", (16, 16), color) for color in ("red", "green", "blue")]
    frames[0].save(tmp_path / f"moving.{kind}", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / f"still.{kind}")
    facts = inspect(str(tmp_path))["splits"]["train"]
    assert (facts["images"], facts["pages"]) == (2, {"files": 1, "pages": 3})
    for memory in ("always", "never"):
        assert load_or_scan(open_images(tmp_path), memory=memory).pages == 2
