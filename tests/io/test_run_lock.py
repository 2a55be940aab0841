import contextlib
import os
import signal
import time

import filelock
import pytest
from expect import user_error

from localagg import checkpoint
from localagg.config import PretrainConfig, override
from localagg.io.run_lock import lock_run
from localagg.recipes.builtin import recipe
from localagg.training.runs import pretrain, resume


def holder(run, *, worker=False):
    """A process that holds a run's lock until it is killed, perhaps with a worker of its own."""
    ready, told = os.pipe()
    process = os.fork()
    if process == 0:
        with contextlib.suppress(BaseException), lock_run(run):
            child = os.fork() if worker else 0
            if worker and child == 0:
                time.sleep(60)
            os.write(told, f"{child}\n".encode())
            time.sleep(60)
        os._exit(1)
    os.close(told)
    with os.fdopen(ready) as pipe:
        child = int(pipe.readline())
    return process, child


def kill(process):
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)


def test_the_error_names_the_process_that_holds_the_lock(tmp_path):
    config = override(recipe("digits").config, epochs=1, ir_epochs=1, device="cpu")
    checkpoint.begin_run(tmp_path / "run", config, {"data": "digits", **facts()})
    process, _ = holder(tmp_path / "run")
    try:
        with user_error("busy", f"{process} on", tmp_path / "run"):
            resume(tmp_path / "run")
        (tmp_path / "new").mkdir()
        other, _ = holder(tmp_path / "new")
        with user_error("busy", f"{other} on", tmp_path / "new"):
            pretrain(config, "digits", tmp_path / "new")
        kill(other)
    finally:
        kill(process)


def facts():
    from localagg.data.sources.open import open_images

    source = open_images("digits")
    return {"fingerprint": source.fingerprint(), "size": len(source)}


def test_a_killed_process_frees_its_lock_while_its_worker_lives(tmp_path):
    process, worker = holder(tmp_path, worker=True)
    kill(process)
    os.kill(worker, 0)  # it lives
    try:
        with lock_run(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_the_lock_ends_with_its_block_and_its_file_is_no_run(tmp_path):
    for _ in range(2):
        with lock_run(tmp_path / "run"):
            pass
    checkpoint.check_new(tmp_path / "run")
    (tmp_path / "run" / "checkpoints").mkdir()
    checkpoint.check_new(tmp_path / "run")
    checkpoint.begin_run(tmp_path / "run", PretrainConfig(), {})
    (tmp_path / "run" / "checkpoints" / "step-000000001").mkdir()
    with user_error("exists", tmp_path / "run"):
        checkpoint.check_new(tmp_path / "run")


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(95, "Not supported")])
def test_a_file_system_without_locks_is_an_environment_error(tmp_path, monkeypatch, error):
    def fail(lock):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", fail)
    with user_error("environment", tmp_path / "run"), lock_run(tmp_path / "run"):
        pass
