"""Whole runs, small: what they learn, how a killed run ends, and what is refused."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from expect import user_error
from PIL import Image
from small_runs import QUICK, assert_same, state

from localagg import checkpoint
from localagg.config import PretrainConfig, override
from localagg.embeddings.open_table import open_table
from localagg.errors import Interrupted, UserError
from localagg.io.metrics_log import read_metrics
from localagg.recipes.builtin import recipe
from localagg.training.learner import make_encoder
from localagg.training.recorder import Recorder
from localagg.training.runs import pretrain, resume


def test_a_run_learns_and_tells(tmp_path, capsys):
    out = pretrain(override(QUICK, epochs=10, ir_epochs=8, width=16), "digits", tmp_path / "run")
    told = re.findall(
        r"^epoch (\d+)/10  (IR|LA) loss \d.\d{3}  spread \d.\d\d  .*knn1 .*%  \d:\d\d left$",
        capsys.readouterr().err,
        re.MULTILINE,
    )
    phases = ["IR"] * 8 + ["LA"] * 2
    assert told == [(str(epoch), phase) for epoch, phase in enumerate(phases, 1)]
    lines = read_metrics(tmp_path / "run")
    losses = [line for line in lines if "loss" in line]
    assert {line["phase"] for line in losses} == {"IR", "LA"}
    assert all("without_close" in line for line in losses if line["phase"] == "LA")
    instance = [line["loss"] for line in losses if line["phase"] == "IR"]
    assert instance[-1] < instance[0] - 0.5
    measured = [line["knn1"] for line in lines if "knn1" in line]
    assert len(measured) == 10
    assert out["final"]["knn1"] == measured[-1] > 0.5  # chance is 0.1
    assert out["steps"] == 10 * 14
    assert sum(out["shares"].values()) == pytest.approx(1, abs=1e-3)
    assert {"network", "loss engine", "clustering", "augmentation"} <= set(out["shares"])
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    bank = checkpoint.load_bank(tmp_path / "run")
    torch.testing.assert_close(bank.norm(dim=1), torch.ones(1400))
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        pretrain(override(QUICK, epochs=2, seed=seed), "digits", tmp_path / name)
    assert_same(tmp_path / "a", tmp_path / "b")
    first, other = state(tmp_path / "a"), state(tmp_path / "c")
    assert not torch.equal(first["bank-0-of-1/rows"], other["bank-0-of-1/rows"])


_RUN = """
import sys, json, torch
torch.set_num_threads(1)
from pathlib import Path
from localagg.config import PretrainConfig, from_dict
from localagg.training.runs import pretrain, resume
config = from_dict(PretrainConfig, json.loads(sys.argv[1]))
run = Path(sys.argv[3])
if (run / "config.json").exists():
    resume(run, data=sys.argv[2])
else:
    pretrain(config, sys.argv[2], run)
"""


def start(config: PretrainConfig, data: str, run: Path) -> subprocess.Popen:
    from localagg.config import to_dict

    command = [sys.executable, "-c", _RUN, json.dumps(to_dict(config)), data, str(run)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True)


def kill_at(process: subprocess.Popen, run: Path, step: int) -> None:
    """SIGKILL the whole group as soon as a checkpoint of ``step`` or later can be seen."""
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        folders = [p.name for p in (run / "checkpoints").glob("step-*")] if run.exists() else []
        if any(int(name.removeprefix("step-")) >= step for name in folders):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(0.001)
    process.wait()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(0, 4), (2, 3)])
def test_killed_and_resumed_ends_as_if_never_killed(tmp_path, pictures, workers, kills):
    config = override(
        QUICK,
        epochs=4,
        ir_epochs=2,
        batch_size=8,
        neighbors=20,
        clusters=(4, 6),
        image_size=16,
        gray=0.2,
        jitter=(0.4, 0.4, 0.4, 0.1),
        flip=0.5,
        workers=workers,
        memory="never",
        log_every=1,
        warm_clusters=True,
    )
    data = str(pictures)
    pretrain(config, data, tmp_path / "whole")  # 6 steps an epoch, 24 in all
    often = override(config, checkpoint_seconds=0.0)
    broken = tmp_path / "broken"
    for step in sorted(random.Random(workers).sample(range(1, 17), kills)):  # well before the end
        kill_at(start(often, data, broken), broken, step)
    final = start(often, data, broken)
    assert final.wait(120) == 0
    assert_same(tmp_path / "whole", broken)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, monkeypatch):
    pretrain(QUICK, "digits", tmp_path / "whole")
    after, steps = Recorder.after_step, []

    def press(self, *arguments, **options):
        after(self, *arguments, **options)
        steps.append(self.learner.step)
        if len(steps) == 17:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Recorder, "after_step", press)
    with pytest.raises(Interrupted, match=r"--resume .*stopped"):
        pretrain(QUICK, "digits", tmp_path / "stopped")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert checkpoint.latest(tmp_path / "stopped").name.endswith("17")
    resume(tmp_path / "stopped", override(QUICK, workers=1), typed=["workers"])
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("epoch", [1, 2])
def test_killed_between_the_end_of_an_epoch_and_its_measurement(tmp_path, monkeypatch, epoch):
    from localagg.evaluation.online_knn import OnlineKnn

    pretrain(QUICK, "digits", tmp_path / "whole")
    measure, calls = OnlineKnn.__call__, []

    def die(self, *arguments):
        calls.append(1)
        if len(calls) == epoch:
            raise KeyboardInterrupt
        return measure(self, *arguments)

    monkeypatch.setattr(OnlineKnn, "__call__", die)
    often = override(QUICK, checkpoint_seconds=0.0)
    with pytest.raises(KeyboardInterrupt):
        pretrain(often, "digits", tmp_path / "broken")
    monkeypatch.undo()
    resume(tmp_path / "broken")
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_ctrl_c_at_the_end_of_an_epoch_leaves_its_measurement_in(tmp_path, monkeypatch):
    pretrain(QUICK, "digits", tmp_path / "whole")
    after = Recorder.after_step

    def press(self, *arguments, ends):
        after(self, *arguments, ends=ends)
        if self.learner.step == 14:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Recorder, "after_step", press)
    with pytest.raises(Interrupted):
        pretrain(QUICK, "digits", tmp_path / "stopped")
    monkeypatch.undo()
    resume(tmp_path / "stopped")
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_resuming_a_finished_run_changes_nothing(tmp_path, capsys):
    first = pretrain(override(QUICK, epochs=1), "digits", tmp_path / "run")
    before = checkpoint.latest(tmp_path / "run").stat().st_mtime_ns
    assert resume(tmp_path / "run") == first
    assert checkpoint.latest(tmp_path / "run").stat().st_mtime_ns == before


def test_resume_refuses_other_data_and_other_options(tmp_path, pictures):
    run = tmp_path / "run"
    pretrain(override(QUICK, epochs=1, ir_epochs=1), "digits", run)
    with user_error("mismatch", pictures, "48", "1,400"):
        resume(run, data=str(pictures))
    with user_error("mismatch", run, "--momentum", "0.5"):
        resume(run, override(QUICK, momentum=0.5), typed=["momentum"])
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["objective"]["recluster_delay"] = 5  # by an earlier version
    (run / "config.json").write_text(json.dumps(stored))
    assert checkpoint.read_run(run)[0].epochs == 1  # measurements go on
    with user_error("unsupported", run, "--recluster-delay 5"):
        resume(run)


def test_folders_that_do_not_fit_are_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with user_error("exists", tmp_path / "full"):
        pretrain(QUICK, "digits", tmp_path / "full")
    checkpoint.begin_run(tmp_path / "run", QUICK, {"data": "digits"})
    (tmp_path / "run" / "checkpoints" / "step-000000001").mkdir()
    with user_error("exists", tmp_path / "run"):
        pretrain(QUICK, "digits", tmp_path / "run")
    with user_error("not-found", tmp_path / "full"):
        resume(tmp_path / "full")
    with user_error("not-found", tmp_path / "none"):
        resume(tmp_path / "none")


def blank_pictures(folder, count, side):
    folder.mkdir()
    draws = np.random.RandomState(0)
    for i in range(count):
        pixels = draws.randint(0, 256, (side, side, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:04d}.png")
    return str(folder)


@pytest.mark.parametrize("count", [1, 2, 3, 257])
def test_any_number_of_images_learns(tmp_path, count):
    """A first bank of 257 images ends in a batch of one, which batch-norm cannot normalize."""
    images = blank_pictures(tmp_path / "images", count, 8)
    config = override(recipe("folder").config, epochs=1, image_size=16 if count == 1 else 8,
                      width=8, blocks=(1, 1, 1, 1), model="resnet18_small", workers=0,
                      device="cpu", precision="32-true")  # fmt: skip
    assert pretrain(config, images, tmp_path / "run")["images"] == count
    assert checkpoint.load_bank(tmp_path / "run").isfinite().all()


@pytest.mark.parametrize(
    ("options", "values"),
    [
        ({"batch_size": 1}, ["batch of 1", "8 pixels", "--image-size", "--batch-size"]),
        ({"model": "alexnet_bn", "batch_size": 2}, ["alexnet_bn", "8x8"]),
    ],
)
def test_a_network_that_cannot_train_is_refused_before_a_folder_is_made(tmp_path, options, values):
    images = blank_pictures(tmp_path / "images", 5, 8)
    config = override(recipe("folder").config, epochs=1, image_size=8, device="cpu", workers=0)
    with pytest.raises(UserError) as caught:
        pretrain(override(config, **options), images, tmp_path / "run")
    assert [value for value in values if value not in str(caught.value)] == []
    assert not (tmp_path / "run").exists()


def test_a_run_that_failed_before_its_first_checkpoint_begins_anew(tmp_path):
    run = tmp_path / "run"
    checkpoint.begin_run(run, override(QUICK, width=16), {"data": "elsewhere"})
    (run / "metrics.jsonl").write_text('{"epoch": 1, "loss": 99}\n')
    pretrain(override(QUICK, epochs=1, ir_epochs=0), "digits", run)
    assert {line["epoch"] for line in read_metrics(run)} == {1}
    assert 99 not in [line.get("loss") for line in read_metrics(run)]
    assert checkpoint.read_run(run)[0].encoder.width == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_device_that_is_not_there_is_refused(tmp_path):
    with user_error("environment", "--device cuda"):
        pretrain(override(QUICK, device="cuda"), "digits", tmp_path / "gpu")


@pytest.mark.parametrize("memory", ["auto", "never"])
def test_unreadable_images_are_refused_or_skipped(tmp_path, pictures, memory):
    import shutil

    data = tmp_path / "data"
    shutil.copytree(pictures / "train", data)
    (data / "flower" / "03.jpg").write_bytes(b"nothing")
    (data / "temple" / "05.png").write_bytes(b"")
    config = override(
        PretrainConfig(), epochs=1, batch_size=8, width=8, blocks=(1,), image_size=16,
        model="resnet18_small", memory=memory, workers=0, neighbors=8, clusters=(4,),
        ir_epochs=0, device="cpu",
    )  # fmt: skip
    with pytest.raises(UserError) as caught:
        pretrain(config, str(data), tmp_path / "refused")
    message = str(caught.value)
    assert "2 of 49 images" in message
    assert "flower/03.jpg (it is text" in message
    assert "--unreadable skip" in message
    assert not (tmp_path / "refused").exists()
    out = pretrain(override(config, unreadable="skip"), str(data), tmp_path / "skipped")
    assert out["unreadable"] == 2


def test_nce_and_the_random_bank_run_as_in_the_reference(tmp_path):
    config = override(QUICK, epochs=2, instance_loss="nce", noise=64, bank_start="random")
    pretrain(config, "digits", tmp_path / "run")
    line = read_metrics(tmp_path / "run")[0]
    assert line["loss"] == pytest.approx(line["data_term"] + line["noise_term"], rel=1e-5)


def test_a_run_with_a_head_of_two_layers_and_a_rate_that_falls_as_a_cosine(tmp_path):
    config = override(QUICK, head_layers=2, rate_schedule="cosine", log_every=1)
    pretrain(config, "digits", tmp_path / "run")
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert rates[0] == config.learning_rate
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.01 * rates[0]
    start = make_encoder(config.encoder, config.seed).state_dict()
    learned = checkpoint.load_encoder(tmp_path / "run").state_dict()
    assert not torch.equal(learned["hidden.0.weight"], start["hidden.0.weight"])


def test_ir_and_la_go_on_from_a_finished_run_of_ir_as_if_it_were_one(tmp_path):
    whole = override(QUICK, epochs=3, ir_epochs=2, drops=())
    pretrain(whole, "digits", tmp_path / "whole")
    pretrain(override(whole, epochs=2), "digits", tmp_path / "ir")
    pretrain(whole, "digits", tmp_path / "la", start=tmp_path / "ir")
    first, second = state(tmp_path / "whole"), state(tmp_path / "la")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    alone = override(whole, ir_epochs=3)
    pretrain(alone, "digits", tmp_path / "alone")
    pretrain(alone, "digits", tmp_path / "on", start=tmp_path / "ir")
    first, second = state(tmp_path / "alone"), state(tmp_path / "on")
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    with user_error("mismatch", tmp_path / "ir", "resnet18_small"):
        pretrain(override(QUICK, width=16), "digits", tmp_path / "no", start=tmp_path / "ir")
    assert not (tmp_path / "no").exists()


def test_ir_may_have_a_batch_of_its_own_and_la_then_starts_inside_an_epoch(tmp_path):
    config = override(QUICK, epochs=4, ir_epochs=1, ir_batch_size=90, batch_size=200, log_every=1)
    out = pretrain(config, "digits", tmp_path / "whole")
    lines = [line for line in read_metrics(tmp_path / "whole") if "loss" in line]
    phases = [(line["epoch"], line["phase"]) for line in lines]
    # 15 steps of 90 images, then epochs of 7 steps: LA starts at step 15, the second of epoch 3.
    assert phases == [(1, "IR")] * 15 + [(3, "LA")] * 6 + [(4, "LA")] * 7
    assert out["steps"] == 28
    often = override(config, checkpoint_seconds=0.0)
    after = Recorder.after_step

    def stop(self, *arguments, **options):
        after(self, *arguments, **options)
        if self.learner.step == 18:
            raise KeyboardInterrupt

    Recorder.after_step = stop
    try:
        with pytest.raises(KeyboardInterrupt):
            pretrain(often, "digits", tmp_path / "broken")
    finally:
        Recorder.after_step = after
    resume(tmp_path / "broken")
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_a_run_is_resumed_and_measured_from_another_folder(tmp_path, pictures, monkeypatch):
    """Relative paths of the data are noted absolute, too."""
    pictures = shutil.copytree(pictures, tmp_path / "home" / "pictures")
    monkeypatch.chdir(pictures.parent)
    config = override(QUICK, epochs=1, ir_epochs=1, image_size=16, batch_size=8, neighbors=8)
    config = override(config, clusters=(4,), workers=0, augmentation="reference", eval_crop=1.0)
    pretrain(override(config, memory="never"), pictures.name, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert Path(checkpoint.read_run("run")[1]["data"]) == pictures
    newest = checkpoint.latest(tmp_path / "run") / "progress.json"
    newest.write_text(json.dumps(json.loads(newest.read_text()) | {"summary": None}))
    assert resume("run")["images"] == 48
    with user_error("not-found", "elsewhere"):
        resume("run", data="elsewhere")
    images = pictures.rename(pictures.with_name("moved"))
    with user_error("not-found", pictures, "--data"):
        resume("run")
    resume("run", data=images)  # finished: only the place is noted
    assert Path(checkpoint.read_run("run")[1]["data"]) == images
    assert len(open_table("run")) == 48
    (tmp_path / "run").rename(tmp_path / "renamed")
    assert resume("renamed")["run"] == "renamed"
