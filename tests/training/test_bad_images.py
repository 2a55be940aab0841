"""Bad images in training, end to end: refused by name, or left out and counted."""

import shutil
import subprocess
import sys

import pytest
import torch
from damage import middle_lost
from safetensors.torch import load_file

from localagg import checkpoint
from localagg.config import PretrainConfig, override
from localagg.data.sources.open import open_images
from localagg.errors import UserError
from localagg.io.metrics_log import read_metrics
from localagg.training.loop import pretrain, resume

CONFIG = override(
    PretrainConfig(),
    epochs=3,
    ir_epochs=2,
    batch_size=8,
    model="resnet18_small",
    width=8,
    blocks=(1,),
    image_size=16,
    memory="never",
    workers=0,
    neighbors=8,
    clusters=(4,),
    device="cpu",
    precision="32-true",
    eval_every=0,
    checkpoint_seconds=0.0,
)


BAD = "temple/06.jpg"


@pytest.fixture
def data(pictures, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(pictures / "train", folder)
    return folder


def test_an_image_that_fails_mid_way_is_named_and_the_run_goes_on_without_it(data, tmp_path):
    """Stopped by it and resumed with skip, the run ends as one that skipped from the beginning."""
    (data / BAD).write_bytes(middle_lost((data / BAD).read_bytes()))
    index = open_images(data).paths.index(BAD)
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match=f"1 of 48 images cannot be read: {BAD} .its data end .*--unreadable skip"
    ):
        pretrain(CONFIG, str(data), run)
    stopped = checkpoint.latest(run)
    assert checkpoint.read_progress(stopped)["step"] > 0  # nothing is lost
    with pytest.raises(UserError, match=BAD):
        resume(run)
    assert checkpoint.latest(run) == stopped

    skipping = override(CONFIG, unreadable="skip")
    out = resume(run, skipping, typed=["unreadable"])
    whole = pretrain(skipping, str(data), tmp_path / "whole")
    assert out["unreadable"] == whole["unreadable"] == 1
    assert out["steps"] == whole["steps"] == 3 * 6
    for name in ("model", "bank-0-of-1"):
        one, two = (
            load_file(checkpoint.latest(folder) / f"{name}.safetensors")
            for folder in (run, tmp_path / "whole")
        )
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
    counted = [line for line in read_metrics(tmp_path / "whole") if "unreadable" in line]
    assert [(line["epoch"], line["unreadable"]) for line in counted] == [(1, 1), (2, 1), (3, 1)]
    untouched = checkpoint.load_bank(tmp_path / "whole")
    assert len(untouched) == 48  # the image keeps its row
    assert checkpoint.read_progress(checkpoint.latest(run))["unreadable"] == [index]


def test_a_cut_image_is_named_before_the_first_step(data, tmp_path):
    path = data / BAD
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=f"1 of 48 images cannot be read: {BAD} .*truncated"):
        pretrain(CONFIG, str(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()


DYING = """
import os, signal, sys
from torch.utils.data import get_worker_info
from localagg.data.sources.image_folder import ImageFolder
from localagg.cli import main
read = ImageFolder.__getitem__
def deadly(self, index):
    if get_worker_info() is not None and index == 17:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, index)
ImageFolder.__getitem__ = deadly
sys.exit(main(sys.argv[1:]))
"""


def test_a_killed_worker_ends_the_run_with_one_sentence(data, tmp_path):
    """As the kernel does where memory runs out; the last checkpoint stays."""
    words = (
        f"pretrain folder --data {data} --out {tmp_path / 'run'} --epochs 2 --ir-epochs 2"
        " --batch-size 8 --model resnet18_small --width 8 --blocks 1 --image-size 16"
        " --memory never --workers 2 --device cpu --eval-every 0 --clusters 4 --neighbors 8"
        " --bank-start random"
    )
    done = subprocess.run(
        [sys.executable, "-c", DYING, *words.split()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("localagg: A worker process that reads images was killed")
    assert "Traceback" not in done.stderr
    assert checkpoint.latest(tmp_path / "run").exists()
