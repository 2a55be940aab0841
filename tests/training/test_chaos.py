"""Failures in whole runs: killed workers, preemption, full disks, losses that are not finite."""

import contextlib
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compare_runs import assert_same_run, state
from expect import user_error

from localagg import checkpoint
from localagg.config import override
from localagg.data.loading.loader import Feed
from localagg.data.sources.open import open_images
from localagg.errors import Interrupted, UserError
from localagg.recipes.builtin import recipe
from localagg.training.learner import Learner
from localagg.training.recorder import Recorder
from localagg.training.runs import pretrain, resume

# 14 steps an epoch.
QUICK = override(
    recipe("digits").config,
    epochs=3, ir_epochs=1, width=4, blocks=(1,), neighbors=64, clusters=(10, 20),
    kmeans_iterations=3, batch_size=100, eval_every=0, device="cpu", precision="32-true",
)  # fmt: skip


@contextlib.contextmanager
def at_step(step, action):
    """Call ``action`` once, right after a step."""
    after = Recorder.after_step

    def watched(self, *arguments, **options):
        after(self, *arguments, **options)
        if self.learner.step == step:
            Recorder.after_step = after
            action(self)

    Recorder.after_step = watched
    try:
        yield
    finally:
        Recorder.after_step = after


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    run = tmp_path_factory.mktemp("whole") / "run"
    pretrain(QUICK, "digits", run)
    return run


def test_preemption_saves_after_the_step_and_the_run_resumes(tmp_path, whole):
    run = tmp_path / "run"
    with (
        at_step(17, lambda _: os.kill(os.getpid(), signal.SIGTERM)),
        pytest.raises(Interrupted, match=r"step 17.*--resume") as caught,
    ):
        pretrain(QUICK, "digits", run)
    assert caught.value.status == 75
    assert checkpoint.latest(run).name == "step-000000017"
    resume(run)
    assert_same_run(whole, run)


def test_preemption_while_clustering_stops_after_one_clustering(tmp_path, whole, monkeypatch):
    run, seen, after = tmp_path / "run", [], Recorder.after_clustering

    def preempt(self, number, found):
        seen.append(number)
        os.kill(os.getpid(), signal.SIGTERM)
        after(self, number, found)

    monkeypatch.setattr(Recorder, "after_clustering", preempt)
    with pytest.raises(Interrupted, match="step 14"):
        pretrain(QUICK, "digits", run)
    assert seen == [0]
    monkeypatch.undo()
    resume(run)
    assert_same_run(whole, run)


@pytest.mark.slow
def test_a_preempted_command_exits_with_75_when_its_workers_get_the_signal_too(tmp_path, pictures):
    run = tmp_path / "run"
    options = (
        "--epochs 400 --ir-epochs 400 --batch-size 8 --width 4 --blocks 1 --image-size 16"
        " --model resnet18_small --workers 2 --memory never --device cpu --eval-every 0"
    )
    command = [sys.executable, "-m", "localagg", "pretrain"]
    begun = [*command, "folder", "--data", str(pictures), "--out", str(run), *options.split()]
    process = subprocess.Popen(begun, stderr=subprocess.PIPE, text=True, start_new_session=True)
    lines, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not (lines.exists() and lines.stat().st_size) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGUSR1)  # as srun does
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert f"localagg pretrain --resume {run}" in stderr
    assert checkpoint.latest(run).name > "step-000000000"
    assert checkpoint.read_progress(checkpoint.latest(run))["summary"] is None


def test_a_killed_worker_is_reported_and_the_run_resumes(tmp_path, pictures):
    config = override(
        QUICK, epochs=4, ir_epochs=2, batch_size=8, neighbors=20, clusters=(4, 6), image_size=16,
        workers=1, memory="never", log_every=1,
    )  # fmt: skip
    pretrain(config, str(pictures), tmp_path / "whole")

    def kill(_):
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGKILL)

    often = override(config, checkpoint_seconds=0.0)
    with at_step(3, kill), user_error("worker-died", "--workers"):
        pretrain(often, str(pictures), tmp_path / "run")
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.parametrize("room", ["metrics", "checkpoint"])
def test_a_full_disk_is_reported_and_the_run_resumes(tmp_path, whole, room):
    run, limits = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(book):
        size = (run / "metrics.jsonl").stat().st_size if room == "metrics" else 100_000
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    try:
        with at_step(17, fill), user_error("environment", "File too large", run):
            pretrain(QUICK, "digits", run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000014"]
    resume(run)
    assert_same_run(whole, run)


@pytest.mark.parametrize("moment", ["before the configuration", "before the first checkpoint"])
def test_a_run_that_was_killed_at_its_start_resumes(tmp_path, whole, monkeypatch, moment):
    run = tmp_path / "run"

    def die(*_, **__):
        raise KeyboardInterrupt

    if moment == "before the configuration":
        monkeypatch.setattr(checkpoint, "write_json", die)
    else:
        monkeypatch.setattr(Learner, "save", die)
    with pytest.raises(KeyboardInterrupt):
        pretrain(QUICK, "digits", run)
    monkeypatch.undo()
    if moment == "before the configuration":
        with user_error("not-found", run):
            resume(run)
        pretrain(QUICK, "digits", run)
    else:
        resume(run)
    assert_same_run(whole, run)


def test_a_run_from_another_run_resumes_when_killed_before_its_first_checkpoint(
    tmp_path, monkeypatch
):
    alone = override(QUICK, epochs=1, ir_epochs=1)
    pretrain(alone, "digits", tmp_path / "ir")
    pretrain(QUICK, "digits", tmp_path / "whole", start=tmp_path / "ir")

    def die(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(Learner, "save", die)
    with pytest.raises(KeyboardInterrupt):
        pretrain(QUICK, "digits", tmp_path / "run", start=tmp_path / "ir")
    monkeypatch.undo()
    resume(tmp_path / "run")
    assert_same_run(tmp_path / "whole", tmp_path / "run")


def all_finite(run: Path) -> bool:
    return all(tensor.isfinite().all() for tensor in state(run).values())


@pytest.mark.parametrize("often", [0.0, 60.0])
def test_a_loss_that_is_not_finite_names_step_images_and_the_last_good_checkpoint(tmp_path, often):
    run = tmp_path / "run"
    wild = override(QUICK, learning_rate=1e15, log_every=5, checkpoint_seconds=often)
    with pytest.raises(UserError, match=r"is not finite|loss is (nan|inf)") as caught:
        pretrain(wild, "digits", run)
    found = json.loads((run / "not-finite.json").read_text())
    assert f"step {found['step']}" in str(caught.value)
    assert found["checkpoint"] == str(checkpoint.latest(run))
    assert f"'{checkpoint.latest(run)}'" in str(caught.value)
    assert checkpoint.read_progress(checkpoint.latest(run))["step"] < found["step"]
    source = open_images("digits")
    order = Feed(source, wild.views, batch_size=1, seed=wild.seed).order(found["epoch"] - 1)
    batch = order.split(100)[(found["step"] - 1) % 14].tolist()
    assert found["index"] == batch
    assert f"(images {batch[0]}, {batch[1]}, " in str(caught.value)
    assert all_finite(run)


def test_weights_that_are_not_finite_are_never_saved_though_the_losses_are(tmp_path):
    run = tmp_path / "run"

    def harm(book):
        with torch.no_grad():
            next(iter(book.learner.encoder.parameters()))[0, 0] = float("nan")
        book.checkpoint()

    with at_step(17, harm), pytest.raises(UserError, match=r"After step 17 \S+ is not finite"):
        pretrain(QUICK, "digits", run)
    assert checkpoint.latest(run).name == "step-000000014"
    assert all_finite(run)


def test_a_compiled_network_learns_the_same(tmp_path, whole, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter, compiled = CompileCounter(), torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: compiled(network, backend=counter))
    pretrain(override(QUICK, compile=True), "digits", tmp_path / "run")
    assert counter.frame_count > 0
    assert_same_run(whole, tmp_path / "run")
