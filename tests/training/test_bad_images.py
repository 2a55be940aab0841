"""Unreadable images in training: an error names them, or they are skipped and counted."""

import shutil

import pytest
from compare_runs import assert_same_state
from damage import middle_lost
from expect import user_error

from localagg import checkpoint
from localagg.config import PretrainConfig, override
from localagg.data.sources.open import open_images
from localagg.io.metrics_log import read_metrics
from localagg.training.runs import pretrain, resume

CONFIG = override(
    PretrainConfig(),
    epochs=3, ir_epochs=2, batch_size=8, model="resnet18_small", width=8, blocks=(1,),
    image_size=16, memory="never", workers=0, neighbors=8, clusters=(4,), device="cpu",
    precision="32-true", eval_every=0, checkpoint_seconds=0.0,
)  # fmt: skip
BAD = "temple/06.jpg"


@pytest.fixture
def data(pictures, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(pictures / "train", folder)
    return folder


def test_an_image_that_fails_in_training_is_named_and_the_run_resumes_without_it(data, tmp_path):
    """Stopped by the image and resumed with skip, a run equals one that skipped from the start."""
    (data / BAD).write_bytes(middle_lost((data / BAD).read_bytes()))
    index = open_images(data).paths.index(BAD)
    run, whole = tmp_path / "run", tmp_path / "whole"
    with user_error("unreadable-images", "1 of 48", BAD, "--unreadable skip"):
        pretrain(CONFIG, str(data), run)
    stopped = checkpoint.latest(run)
    assert checkpoint.read_progress(stopped)["step"] > 0  # nothing is lost
    with user_error("unreadable-images", BAD):
        resume(run)
    assert checkpoint.latest(run) == stopped

    skipping = override(CONFIG, unreadable="skip")
    resumed = resume(run, skipping, typed=["unreadable"])
    expected = pretrain(skipping, str(data), whole)
    assert resumed["unreadable"] == expected["unreadable"] == 1
    assert resumed["steps"] == expected["steps"] == 3 * 6
    assert_same_state(run, whole)
    counted = [line for line in read_metrics(whole) if "unreadable" in line]
    assert [(line["epoch"], line["unreadable"]) for line in counted] == [(1, 1), (2, 1), (3, 1)]
    assert len(checkpoint.load_bank(whole)) == 48  # the image keeps its row
    assert checkpoint.read_progress(checkpoint.latest(run))["unreadable"] == [index]


def test_a_cut_image_is_named_before_the_first_step(data, tmp_path):
    path = data / BAD
    path.write_bytes(path.read_bytes()[:-30])
    with user_error("unreadable-images", "1 of 48", BAD):
        pretrain(CONFIG, str(data), tmp_path / "run")
    assert not (tmp_path / "run").exists()
